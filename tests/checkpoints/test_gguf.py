"""Conversion of GGUF files, compared with the original models in mlx-lm."""

from glass_mlx.checkpoints.gguf import convert
from glass_mlx.checkpoints.gguf_blocks import AFFINE_FORMATS
from glass_mlx.models.architectures import tiny_model
from helpers import GGUF_ARCHITECTURES, write_gguf

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten

KINDS = [
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_1,
]


@pytest.mark.parametrize("model_type", GGUF_ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_converted_model_computes_the_same_as_the_original(model_type, kind, tmp_path):
    model = tiny_model(model_type)
    if kind != GGMLQuantizationType.F32:
        rounded = [
            (path, mx.array(gguf.dequantize(gguf.quantize(np.array(array), kind), kind)))
            for path, array in tree_flatten(model.parameters())
            if array.ndim == 2
        ]
        model.load_weights(rounded, strict=False)
    write_gguf(model, tmp_path / "tiny.gguf", kind)
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    loaded, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.eos_token_ids == {255}
    tokens = mx.array([[254, 7, 3, 200, 9, 54, 21, 5, 6, 7, 8, 9]])
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert hasattr(loaded.layers[0].mlp.gate_proj, "scales") == (kind in AFFINE_FORMATS)


def test_llama3_frequency_factors_become_rope_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_scaling=scaling, rope_theta=500000.0)
    # llama.cpp's converter computes one factor for each pair of dimensions, as follows.
    factors = []
    for i in range(0, 16, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 16)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    write_header = gguf.GGUFWriter.write_header_to_file

    def write_factors_and_header(writer, *args, **kwargs):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
        return write_header(writer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", write_factors_and_header)
        write_gguf(model, tmp_path / "tiny.gguf")
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    loaded, _ = mlx_lm.load(str(folder))
    assert loaded.args.rope_scaling["factor"] == 8.0
    tokens = mx.arange(200)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.factor|longrope"),
        ({"split.count": 3}, "one part of a split"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
    ],
)
def test_unsupported_files_are_refused_with_a_reason(metadata, message, tmp_path, monkeypatch):
    if "tokenizer.ggml.pre" in metadata:
        monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda *_: None)
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file, **metadata)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(GGUF_ARCHITECTURES, "llama", "starcoder")
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"'starcoder'.*llama, qwen2, qwen3, gemma3"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file)
    content = file.read_bytes()
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a complete GGUF file"):
            convert(file, tmp_path)
