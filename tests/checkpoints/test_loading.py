"""Loading of folders, GGUF files and adapters, compared with mlx-lm."""

import json
from pathlib import Path

from glass_mlx import load
from glass_mlx.checkpoints import gguf
from glass_mlx.checkpoints.loading import advice, resolve
from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from helpers import save_tiny_folder, write_gguf

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers


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


def test_a_gguf_file_is_converted_once(cache, gguf_file, monkeypatch):
    converted = resolve(str(gguf_file), "float32")
    assert Path(converted).parent == cache / "models"
    monkeypatch.setattr(gguf, "convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(gguf_file), "float32") == converted
    model, _ = load(str(gguf_file), dtype="float32")
    tokens = mx.array([[1, 2, 3]])
    assert mx.allclose(model(tokens), tiny_model("llama")(tokens), atol=1e-4)


def test_a_gguf_file_with_a_missing_tensor_is_refused(cache, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "a.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight"):
        load(str(tmp_path / "a.gguf"))


def test_a_damaged_or_stale_conversion_is_repeated(cache, gguf_file):
    folder = Path(resolve(str(gguf_file), "float32"))
    weights = folder / "model-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert resolve(str(gguf_file), "float32") == str(folder)
    assert weights.read_bytes() == content
    write_gguf(tiny_model("llama", seed=1), gguf_file)
    assert resolve(str(gguf_file), "float32") != str(folder)


def test_an_interrupted_conversion_leaves_nothing(cache, gguf_file, monkeypatch):
    def interrupt(source, folder, dtype):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf_file))
    assert list((cache / "models").iterdir()) == []


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
def test_missing_paths_are_not_mistaken_for_hub_ids(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)
    assert resolve("someone/some-model") == "someone/some-model"


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
