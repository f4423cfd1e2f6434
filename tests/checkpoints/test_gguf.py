"""Conversion of GGUF files, compared with the original models in mlx-lm."""

from pathlib import Path

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
from tokenizers import pre_tokenizers

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


def convert_tiny(model, folder, **options):
    """Write a model to a GGUF file, convert and load it; return model, tokenizer and folder."""
    write_gguf(model, folder / "tiny.gguf", **options)
    converted = folder / "tiny"
    converted.mkdir()
    convert(folder / "tiny.gguf", converted, "float32")
    return (*mlx_lm.load(str(converted)), converted)


def refusal(folder, is_empty=True, **options):
    """Return the message with which a GGUF file is refused; mostly nothing is written then."""
    write_gguf(options.pop("model", None) or tiny_model("llama"), folder / "tiny.gguf", **options)
    converted = folder / "tiny"
    converted.mkdir()
    with pytest.raises(ValueError, match="cannot be used: ") as error:
        convert(folder / "tiny.gguf", converted)
    assert not (is_empty and list(converted.iterdir()))
    assert "\n" not in str(error.value)
    return str(error.value).partition("cannot be used: ")[2]


def test_no_biases_are_zero_biases_in_mlx_lm(tmp_path):
    # llama.cpp lets each projection have a bias or not, mlx-lm all of them or none.
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    biases = {}
    for path, array in tree_flatten(model.parameters()):
        if not path.endswith(".bias"):
            continue
        layer, name = int(path.split(".")[2]), path.split(".")[-2]
        if name in ("v_proj", "up_proj"):
            values = mx.random.normal(array.shape)
            tensor = "attn_v" if name == "v_proj" else "ffn_up"
            biases[f"blk.{layer}.{tensor}.bias"] = np.array(values)
        else:
            values = mx.zeros(array.shape)
        model.load_weights([(path, values)], strict=False)
    plain = tiny_model("llama")
    plain.load_weights(
        [(k, v) for k, v in tree_flatten(model.parameters()) if not k.endswith(".bias")]
    )
    loaded, _, _ = convert_tiny(plain, tmp_path, tensors=biases)
    tokens = mx.arange(60)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert not mx.allclose(loaded(tokens), plain(tokens), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "token_embd.weight"),
        ("llama", "output_norm.weight"),
        ("llama", "blk.3.attn_q.weight"),
        ("qwen2", "blk.2.attn_k.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight"),
        ("gemma3_text", "blk.1.post_ffw_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(model_type, name, tmp_path):
    message = refusal(tmp_path, model=tiny_model(model_type), leave_out=name)
    assert message.startswith(f"its tensor {name}")
    assert message.endswith("is missing")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.ffn_up.weight", (64, 128), "has the shape (64, 128), not (128, 64)"),
        ("blk.0.attn_norm.weight", (32,), "has the shape (32,), not (64,)"),
        ("output_norm.weight", (64, 1), "has the shape (64, 1), not (64,)"),
        ("blk.4.attn_norm.weight", (64,), "is not part of llama"),
        ("blk.0.attn_q_norm.weight", (16,), "is not part of llama"),
        ("blk.0.attn_norm.bias", (64,), "is not part of llama"),
        ("output.bias", (256,), "is not part of llama"),
        ("cls.output.weight", (2, 64), "is not part of llama"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, shape, message, tmp_path):
    tensors = {name: np.ones(shape, np.float32)}
    assert refusal(tmp_path, tensors=tensors) == f"its tensor {name} {message}"


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.2.attn_norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_numbers_that_the_new_type_cannot_hold_are_refused(name, value, tmp_path):
    values = np.ones((128, 64) if "ffn" in name else (64,), np.float32)
    values[..., 5] = value
    message = refusal(tmp_path, tensors={name: values}, is_empty=False)
    assert message.startswith(f"its tensor {name} has numbers that are not finite in float16; ")
    if np.isfinite(value):
        convert(tmp_path / "tiny.gguf", tmp_path / "tiny", "bfloat16")


def test_tokens_without_a_row_of_the_embedding_are_refused(tmp_path):
    # MLX would read beyond the end of the embedding.
    tokens = [f"<{i}>" for i in range(258)]
    message = refusal(
        tmp_path, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 258}
    )
    assert message == "its tokenizer has 258 tokens, but its embedding has 256 rows"


def test_rows_of_the_embedding_without_a_token_are_no_text(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
    metadata = {
        "tokenizer.ggml.tokens": [*alphabet, "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 200 + [3, 3],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 200,
        "tokenizer.ggml.eos_token_id": 201,
    }
    _, tokenizer, _ = convert_tiny(tiny_model("llama"), tmp_path, **metadata)
    assert tokenizer.eos_token_ids == {201}
    letter = alphabet.index("a")
    assert tokenizer.decode([letter, 230, 255, letter]) == "aa"
    detokenizer = tokenizer.detokenizer
    for token in (letter, 230, 255, letter):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "aa"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"split.count": 3}, "it is one part of a split GGUF; merge the parts first with "),
        ({"general.type": "adapter"}, "it holds no model: its general.type is 'adapter'"),
        ({"general.architecture": None}, "its metadata has no general.architecture"),
        (
            {"general.architecture": "starcoder"},
            "it holds a model of architecture 'starcoder'; only llama, qwen2, qwen3, gemma3 can",
        ),
        ({"tokenizer.ggml.pre": "unheard-of"}, "its pre-tokenizer 'unheard-of' is not known"),
        ({"llama.block_count": 2**31 - 1}, "it has 39 tensors, too few for 2147483647 blocks"),
        ({"llama.block_count": 5}, "its tensor blk.4.attn_norm.weight"),
        ({"llama.block_count": 3}, "its tensor blk.3."),
    ],
)
def test_unsupported_files_are_refused_with_a_reason(metadata, message, tmp_path):
    assert refusal(tmp_path, **metadata).startswith(message)


def test_errors_of_other_libraries_do_not_show(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise IndexError("index 7 is out of bounds for axis 0 with size 3")

    monkeypatch.setattr("glass_mlx.checkpoints.gguf.write_tokenizer", fail)
    assert refusal(tmp_path) == "its parts do not fit together (IndexError)"


def test_errors_of_the_system_pass(tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "missing.gguf", tmp_path)
    with pytest.raises(OSError):
        convert(tmp_path / "tiny.gguf", tmp_path / "missing")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_not_the_fault_of_the_file(tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    for name in ("model-00000.safetensors", "tokenizer.json", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"disk full|No space left"):
            convert(tmp_path / "tiny.gguf", folder)
