"""Loading of folders, GGUF files and adapters, compared with mlx-lm."""

import os

from glass_mlx import load, stream_generate
from glass_mlx.checkpoints.loading import advice, resolve
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from helpers import made_prior, save_adapters, save_tiny_folder, write_gguf

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten


@pytest.fixture
def gguf_file(tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "tiny")


def test_a_folder_loads_as_in_mlx_lm(folder):
    model, tokenizer, config = load(str(folder), return_config=True)
    reference, _ = mlx_lm.load(str(folder))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), reference(tokens))
    assert config["model_type"] == "llama"
    assert tokenizer.encode("丁七") == [1, 3]


def test_a_gguf_file_with_a_missing_tensor_is_refused(cache, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "a.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight"):
        load(str(tmp_path / "a.gguf"))


def test_a_gguf_file_loads(cache, gguf_file):
    model, _ = load(str(gguf_file), dtype="float32")
    tokens = mx.array([[1, 2, 3]])
    assert mx.allclose(model(tokens), tiny_model("llama")(tokens), atol=1e-4)


def test_dtype_and_dequantize(cache, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "q8.gguf", GGMLQuantizationType.Q8_0)
    model, _ = load(str(tmp_path / "q8.gguf"), dtype="bfloat16")
    assert model.layers[0].mlp.gate_proj.scales.dtype == mx.bfloat16
    assert model.layers[0].input_layernorm.weight.dtype == mx.bfloat16
    model, _ = load(str(tmp_path / "q8.gguf"), dtype="float32", dequantize=True)
    assert type(model.layers[0].mlp.gate_proj) is nn.Linear
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    with pytest.raises(ValueError, match="int8"):
        load(str(tmp_path / "q8.gguf"), dtype="int8")


TOKENS = mx.array([[1, 7, 3, 200, 9]])


def test_floating_point_formats_become_the_dtype_asked_for(tmp_path):
    folder = str(save_tiny_folder(tmp_path / "tiny", group_size=32, bits=4, mode="mxfp4"))
    model, _ = load(folder, dtype="float16", dequantize=True)
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float16}
    reference, _ = mlx_lm.load(folder)
    model, _ = load(folder, dtype="float32", dequantize=True)
    assert mx.allclose(model(TOKENS), reference(TOKENS), atol=1e-4)


def test_dtype_keeps_the_weights_that_the_class_exempts(tmp_path):
    folder = str(save_tiny_folder(tmp_path / "tiny", "deepseek_v3"))
    model, _ = load(folder, dtype="bfloat16")
    reference, _ = mlx_lm.load(folder)
    gate, exact = model.layers[1].mlp.gate, reference.layers[1].mlp.gate
    assert gate.weight.dtype == mx.bfloat16
    assert mx.array_equal(gate.e_score_correction_bias, exact.e_score_correction_bias)
    assert gate.e_score_correction_bias.dtype == mx.float32


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_compute_what_mlx_lm_does_and_change_no_weights(tmp_path, kind, bits):
    folder = save_tiny_folder(tmp_path / "tiny", group_size=32, bits=bits)
    adapters = save_adapters(tmp_path / "adapters", folder, kind)
    stock, _ = mlx_lm.load(str(folder), adapter_path=adapters)
    model, _ = load(str(folder), adapter_path=adapters)
    assert mx.array_equal(model(TOKENS), stock(TOKENS))
    effect = stock(TOKENS) - load(str(folder))[0](TOKENS)
    assert mx.linalg.norm(effect) > 1e-2 * mx.linalg.norm(stock(TOKENS))
    model, _ = load(str(folder), adapter_path=adapters, dequantize=True, dtype="float32")
    assert mx.linalg.norm(model(TOKENS) - stock(TOKENS)) < 1e-4 * mx.linalg.norm(stock(TOKENS))
    assert len(find_ffns(model)) == 4


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("deepseek_v3", None),  # experts in one array
        ("llama", ["model.embed_tokens", "lm_head", "mlp.down_proj"]),
        ("qwen2", ["model.embed_tokens", "self_attn.q_proj"]),
    ],
)
def test_adapters_of_experts_embeddings_and_heads_stay_as_in_mlx_lm(tmp_path, architecture, keys):
    quantization = {} if architecture == "deepseek_v3" else {"group_size": 32, "bits": 4}
    folder = save_tiny_folder(tmp_path / "tiny", architecture, **quantization)
    adapters = save_adapters(tmp_path / "adapters", folder, "lora", keys)
    stock, _ = mlx_lm.load(str(folder), adapter_path=adapters)
    model, _ = load(str(folder), adapter_path=adapters)
    assert mx.array_equal(model(TOKENS), stock(TOKENS))
    assert {path for path, _ in model.named_modules()} == {p for p, _ in stock.named_modules()}
    assert find_ffns(model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_released_dense_weights_are_loaded_again_with_their_adapters(tmp_path, kind):
    folder = save_tiny_folder(tmp_path / "tiny", group_size=32, bits=4)
    adapters = save_adapters(tmp_path / "adapters", folder, kind)
    options = {"max_tokens": 20, "warmup": 2, "refresh": 4, "density": 0.5}

    def generate(reload):
        model, tokenizer = load(str(folder), adapter_path=adapters)
        options["prior"] = made_prior(model)
        steps = stream_generate(model, tokenizer, [1, 2, 3], reload=reload, **options)
        return [step.token for step in steps]

    reloaded = generate(lambda: load(str(folder), adapter_path=adapters, lazy=True)[0])
    assert reloaded == generate(None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "no model at missing.gguf"),
        ("./missing", "no model at ./missing"),
        ("/missing", "no model at /missing"),
    ],
)
def test_missing_paths_are_not_mistaken_for_hub_ids(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)
    assert resolve("someone/some-model") == "someone/some-model"


def test_what_is_neither_a_folder_nor_a_file_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in ("/dev/null", str(tmp_path / "pipe.gguf")):
        with pytest.raises(ValueError, match=f"{path} is neither a folder nor a file"):
            load(path)
    with pytest.raises(FileNotFoundError, match="no model at ~nobody"):
        load("~nobody-has-this-name/model")


def test_a_folder_in_which_mlx_lm_finds_nothing_is_refused_with_the_reason(folder, tmp_path):
    moved = folder.rename(tmp_path / "tiny [4bit]")
    with pytest.raises(ValueError, match=r"finds no weights in .*rename it without \[, \]"):
        load(str(moved))


def test_activations_are_not_quantized(folder):
    with pytest.raises(ValueError, match="leave out --quantize-activations"):
        load(str(folder), model_config={"quantize_activations": True})
    load(str(folder), model_config={"quantize_activations": False})


def test_loading_errors_are_one_sentence(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    for length in (1, 1000, len(weights) // 2, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(ValueError, match="cannot be loaded: "):
            load(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot be loaded: ") as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config"):
        load(str(folder))
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match="is a file, but not a"):
        load(str(tmp_path / "model.bin"))


def test_advice_on_a_cpu():
    model = tiny_model("llama")
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float16)
        assert "--dtype float32" in advice(model)
    else:
        assert advice(model) is None
