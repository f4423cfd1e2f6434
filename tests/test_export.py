"""Export of a sliced model as a checkpoint that stock mlx-lm loads."""

import json
import subprocess
import sys
from dataclasses import replace

from glass_mlx import export, load, sliced_checkpoint
from glass_mlx.config import GlassConfig
from glass_mlx.export import main
from glass_mlx.fidelity.prompts import WritingSettings, continue_all, read_prompts
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import configuration, tiny_model
from glass_mlx.prior.file import FILE_NAME
from glass_mlx.selection import select_counts
from glass_mlx.session import Session
from glass_mlx.sliced_checkpoint import narrowed
from glass_mlx.slicing import slice_model
from helpers import made_prior, save_adapters, save_tiny_folder

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

TOKENS = mx.array([[1, 7, 3, 200, 9]])


def make_folder(tmp_path, architecture="llama", **quantization):
    """Save a model with its prior, and a file of prompts; return the model's folder."""
    folder = save_tiny_folder(tmp_path / "dense", architecture, **quantization)
    made_prior(load(str(folder))[0]).save(folder / FILE_NAME)
    (tmp_path / "prompts.txt").write_text("丁七万\n丈三上\n")
    return folder


def run(monkeypatch, tmp_path, *options):
    """Export into the folder `out` and load the result with stock mlx-lm."""
    arguments = [*("--model", tmp_path / "dense"), *("--output", tmp_path / "out"), *options]
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    main()
    return mlx_lm.load(str(tmp_path / "out"))


@pytest.mark.parametrize(
    "quantization",
    [{}, {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}],
    ids=["float", "affine", "mxfp4"],
)
@pytest.mark.parametrize("architecture", ["llama", "glm4", "gemma3_text", "nemotron"])
def test_stock_mlx_lm_computes_what_the_sliced_model_does(
    tmp_path, monkeypatch, architecture, quantization, capsys
):
    folder = make_folder(tmp_path, architecture, **quantization)
    exported, _ = run(monkeypatch, tmp_path, "--density", 0.5)
    dense, _ = load(str(folder))
    session, config = Session(dense), GlassConfig(density=0.5, prior_weight=1.0)
    selector = session.selector(config, made_prior(dense))
    selection = selector.select(session.empty_statistics())
    assert mx.array_equal(exported(TOKENS), slice_model(dense, selection, "requantize")(TOKENS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 64
    assert config["glass"]["density"] == 0.5
    assert "64 neurons in each of 4" in capsys.readouterr().out


def test_a_process_without_this_package_generates_the_same_text(tmp_path, monkeypatch):
    make_folder(tmp_path)
    run(monkeypatch, tmp_path, "--density", 0.5)
    options = ["--model", tmp_path / "out", "--prompt", "丁七万", "-m", "8", "--temp", "0"]
    stock = "import sys; sys.modules['glass_mlx'] = None; from mlx_lm.generate import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", stock, *map(str, options)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    model, tokenizer = load(str(tmp_path / "out"))
    expected = mlx_lm.generate(model, tokenizer, "丁七万", max_tokens=8)
    assert result.stdout.split("==========")[1].strip() == expected


def test_generated_answers_determine_the_selection(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    options = ["--prompts", tmp_path / "prompts.txt", "--tokens", 12, "--no-prior"]
    exported, _ = run(monkeypatch, tmp_path, *options, "--density", 0.5)
    dense, tokenizer = load(str(folder))
    texts = continue_all(
        dense, tokenizer, read_prompts(tmp_path / "prompts.txt"), WritingSettings(12, 0.7, 0)
    )
    hidden = []
    down = dense.layers[0].mlp.down_proj
    for text in texts:
        x = mx.array(text.prompt + text.written)[None]
        layer = dense.layers[0]
        h = dense.model.embed_tokens(x)
        r = h + layer.self_attn(layer.input_layernorm(h), "causal", None)
        mlp, x = layer.mlp, layer.post_attention_layernorm(r)
        h = mlp.up_proj(x) * mx.sigmoid(mlp.gate_proj(x)) * mlp.gate_proj(x)
        hidden.append(np.array(h[0, len(text.prompt) :]))
    hidden = np.concatenate(hidden)
    scores = np.square(hidden / np.linalg.norm(hidden, axis=1, keepdims=True)).sum(0)
    kept = mx.array(np.sort(np.argsort(-scores)[:64]))
    assert mx.array_equal(exported.layers[0].mlp.down_proj.weight, down.weight[:, kept])


def test_adapters_and_floats_are_exported(tmp_path, monkeypatch):
    make_folder(tmp_path, group_size=32, bits=4)
    exported, _ = run(monkeypatch, tmp_path, "--dequantize", "--dtype", "float32", "--density", 0.5)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.layers[0].mlp.down_proj.weight.shape == (64, 64)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gpt2", "no configuration with 128 instead of 256"),  # the width is 4 times another value
        ("openelm", "have 64, 128, 192, 256 neurons"),
    ],
)
def test_models_without_a_common_ffn_width_are_refused(
    tmp_path, monkeypatch, capsys, architecture, message
):
    make_folder(tmp_path, architecture)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, tmp_path, "--density", 0.5)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-prior"], "nothing to select by"),
        (["--density", "2"], "density"),
        (["--prompts", "missing.txt"], "no prompts"),
        (["--tokens", "1"], "--tokens must be at least 2"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    make_folder(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, tmp_path, *options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "key", "shared"),
    [
        ("qwen3_moe", "moe_intermediate_size", None),
        ("gpt_oss", "intermediate_size", None),
        ("mixtral", "intermediate_size", None),
        ("deepseek_v3", "moe_intermediate_size", 32),  # states the width of shared experts, too
        ("qwen2_moe", "moe_intermediate_size", 64),  # states them apart
    ],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_routed_experts_are_exported(
    tmp_path, monkeypatch, capsys, architecture, key, shared, bits
):
    if bits and architecture == "deepseek_v3":
        pytest.skip("its tiny model has layers that are too narrow to quantize")
    quantization = {"group_size": 32, "bits": bits} if bits else {}
    folder = make_folder(tmp_path, architecture, **quantization)
    exported, _ = run(monkeypatch, tmp_path, "--density", 0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[key] == configuration(architecture)[key] // 2
    dense, _ = load(str(folder))
    prior, ffns = made_prior(dense), find_ffns(dense)
    widths = {f.path: f.width // 2 if f.experts else f.width for f in ffns}
    widths |= {f.path: shared for f in ffns if "shared" in f.path}
    selection = select_counts(prior.ranks("griffin"), widths)
    sliced = slice_model(dense, selection, "requantize")
    assert mx.array_equal(exported(TOKENS), sliced(TOKENS))
    layers = sum(ffn.experts is not None for ffn in ffns)
    assert f"in each of 4 experts of {layers} layers" in capsys.readouterr().out


def test_existing_output_is_not_overwritten(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert "there is something at" in capsys.readouterr().err
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize(
    ("name", "read_width"),
    [
        ("qwen", lambda config: config["intermediate_size"] // 2),  # it states twice the width
        ("lfm2", lambda config: config["intermediate_size"]),
        ("gemma3", lambda config: config["text_config"]["intermediate_size"]),
    ],
)
def test_the_width_is_replaced_in_every_form_of_configuration(name, read_width):
    try:
        model, config = tiny_model(name), configuration(name)
    except TypeError:
        pytest.skip("this mlx-lm states the width of the architecture in another form")
    assert read_width(narrowed(model, config, 128, 96)) == 96


def test_prior_and_answers_are_fused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    prior = made_prior(load(str(folder))[0])
    options = ["--prompts", tmp_path / "prompts.txt", "--tokens", 12, "--density", 0.5]
    exported, _ = run(monkeypatch, tmp_path, *options, "--prior-weight", "1")
    metadata = json.loads((tmp_path / "out" / "config.json").read_text())["glass"]
    assert (metadata["prompts"], metadata["prior_weight"], metadata["prior"]) == (2, 1.0, FILE_NAME)
    recipe = json.loads((tmp_path / "out" / "quant-recipe.json").read_text())
    assert (recipe["method"], recipe["density"], recipe["prompts"]) == ("glass-mlx export", 0.5, 2)
    assert all(isinstance(value, str | int | float) for value in recipe.values())
    dense, _ = load(str(folder))
    session, config = Session(dense), GlassConfig(density=0.5, prior_weight=1.0)
    selector = session.selector(config, replace(prior, about={}))
    selection = selector.select(session.empty_statistics())
    sliced = slice_model(dense, selection, "requantize")
    assert mx.array_equal(exported(TOKENS), sliced(TOKENS))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # an untied and a tied head
@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 4), ("lora", None)])
def test_adapters_are_exported_as_stock_mlx_lm_computes_them(
    tmp_path, monkeypatch, kind, bits, architecture
):
    quantization = {"group_size": 32, "bits": bits} if bits else {}
    folder = make_folder(tmp_path, architecture, **quantization)
    adapters = save_adapters(tmp_path / "adapters", folder, kind)
    stock, _ = mlx_lm.load(str(folder), adapter_path=adapters)
    made_prior(stock).save(tmp_path / "prior")
    options = ["--adapter-path", adapters, "--prior", tmp_path / "prior"]
    exported, _ = run(monkeypatch, tmp_path, *options, "--density", 0.5)

    session, config = Session(stock), GlassConfig(density=0.5, prior_weight=1.0)
    selection = session.selector(config, made_prior(stock)).select(session.empty_statistics())
    expected = slice_model(stock, selection, "scatter")(TOKENS)
    assert mx.linalg.norm(exported(TOKENS) - expected) < 1e-4 * mx.linalg.norm(expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization" in config) == bool(bits)  # embeddings have no adapters


def test_only_the_adapted_layers_become_floats(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, group_size=32, bits=4)
    config = json.loads((folder / "config.json").read_text())
    # As a converted GGUF file has it, with an entry for each layer.
    for path, module in load(str(folder))[0].named_modules():
        if "scales" in module:
            config["quantization"][path] = {"group_size": 32, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config))
    keys = ["self_attn.q_proj", "mlp.gate_proj"]
    adapters = save_adapters(tmp_path / "adapters", folder, "lora", keys)
    stock, _ = mlx_lm.load(str(folder), adapter_path=adapters)
    made_prior(stock).save(tmp_path / "prior")
    options = ["--adapter-path", adapters, "--prior", tmp_path / "prior"]
    exported, _ = run(monkeypatch, tmp_path, *options, "--density", 1)
    expected = stock(TOKENS)
    assert mx.linalg.norm(exported(TOKENS) - expected) < 1e-4 * mx.linalg.norm(expected)
    layer, exact = exported.layers[0], stock.layers[0]
    assert "scales" not in layer.self_attn.q_proj
    assert "scales" not in layer.mlp.gate_proj
    assert mx.array_equal(layer.mlp.down_proj.weight, exact.mlp.down_proj.weight)
    assert mx.array_equal(layer.self_attn.v_proj.scales, exact.self_attn.v_proj.scales)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert "model.layers.0.mlp.down_proj" in written
    assert "model.layers.0.mlp.gate_proj" not in written


@pytest.mark.parametrize(
    "output", ["out [1]", "/dev/null", "taken", "taken/config.json/out", "link"]
)
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, run_command, output
):
    folder = make_folder(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    (tmp_path / "link").symlink_to("taken")
    monkeypatch.setattr(export, "load", lambda *_, **__: pytest.fail("loaded"))
    code, _, error = run_command(main, "--model", folder, "--output", tmp_path / output)
    assert code == 2
    assert error.count("\n") == 1
    names = {"dense", "prompts.txt", "taken", "link"}
    assert {file.name for file in tmp_path.iterdir()} == names


def fail(error):
    def save(folder, *arguments, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize(
    "save",
    [
        fail(RuntimeError("[write] Unable to write 300092 bytes to file.")),  # MLX's
        fail(OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, run_command, save):
    folder = make_folder(tmp_path)
    monkeypatch.setattr(sliced_checkpoint, "save", save)
    code, _, error = run_command(main, "--model", folder, "--output", tmp_path / "out")
    assert code == 2
    assert f"{tmp_path / 'out'} cannot be written: " in error
    assert error.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "prompts.txt"}


@pytest.mark.parametrize("quantization", [{}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}])
@pytest.mark.parametrize("options", [[], ["--prompts", "prompts.txt"]])
def test_weights_that_are_not_finite_are_named(tmp_path, run_command, quantization, options):
    folder = make_folder(tmp_path, **quantization)
    path = "model.layers.2.mlp.up_proj." + ("scales" if quantization else "weight")
    arrays = mx.load(str(folder / "model.safetensors"))
    arrays[path][5, 1] = 255 if quantization else float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    options = [tmp_path / option if "." in option else option for option in options]
    code, _, error = run_command(main, "--model", folder, "--output", tmp_path / "out", *options)
    assert code == 2
    assert "weights model.layers.2.mlp.up_proj" in error
    assert "are not finite" in error
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_are_refused(tmp_path, run_command):
    folder = make_folder(tmp_path)
    arrays = mx.load(str(folder / "model.safetensors"))
    for name in ("up_proj", "gate_proj"):
        arrays[f"model.layers.0.mlp.{name}.weight"] *= 1e4
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    options = ["--prompts", tmp_path / "prompts.txt", "--no-prior", "--dtype", "float16"]
    code, _, error = run_command(main, "--model", folder, "--output", tmp_path / "out", *options)
    assert code == 2
    assert "activations are not finite in this precision" in error
    assert not (tmp_path / "out").exists()
