"""Conversion of GGUF files, against the gguf package and against models written in its format."""

from pathlib import Path

from glass_mlx.gguf_checkpoint import AFFINE, affine, convert
from glass_mlx.models.architectures import tiny_model

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

ROWS, COLUMNS = 6, 512
# What llama.cpp calls the parts of mlx-lm's models.
TENSORS = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def random_tensor(kind: Q) -> np.ndarray:
    """Random blocks whose half-precision scales are of ordinary size."""
    generator = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // block, size), np.uint8)
    halves = generator.normal(0, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    scales = 2 if kind in (Q.Q4_0, Q.Q5_0, Q.Q8_0) else 4
    blocks[:, :scales] = halves[:, :scales]
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_kept_codes_mean_what_gguf_says(kind):
    data = random_tensor(kind)
    weight, scales, biases = map(mx.array, affine(data, kind))
    ours = mx.dequantize(weight, scales, biases, 32, AFFINE[kind][0])
    np.testing.assert_allclose(ours, gguf.dequantize(data, kind), rtol=1e-5, atol=1e-6)


def heads_of(model, name):
    return {
        "attn_q": model.args.num_attention_heads,
        "attn_k": model.args.num_key_value_heads,
    }.get(name)


def write_gguf(model, file: Path, kind: Q = Q.F32, leave_out: str = "", **extra) -> None:
    """Write a tiny model the way llama.cpp's converter does."""
    args = model.args
    arch = ARCHITECTURES[args.model_type]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    if arch == "gemma3":
        writer.add_sliding_window(args.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", args.sliding_window_pattern)
    add_tokenizer(writer)
    for key, value in extra.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    names = TENSORS | (GEMMA if arch == "gemma3" else {})
    for path, array in mlx_parameters(model):
        module, part = path.rsplit(".", 1)
        prefix, _, rest = module.partition("model.layers.")
        layer, _, inner = rest.partition(".")
        name = names[inner or prefix]
        value = np.array(array)
        if arch == "gemma3" and name.endswith("norm"):
            value = value + 1
        heads = heads_of(model, name)
        if arch == "llama" and heads:
            halves = value.reshape(heads, 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        full = f"blk.{layer}.{name}.{part}" if layer else f"{name}.{part}"
        if full == leave_out:
            continue
        if value.ndim == 2 and kind != Q.F32:
            writer.add_tensor(full, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mlx_parameters(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A byte-level vocabulary of single bytes and no merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet())[:253], "ab", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 254 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(254)
    writer.add_eos_token_id(255)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0, Q.Q4_1], ids=lambda k: k.name)
def test_a_converted_model_computes_what_the_original_does(model_type, kind, tmp_path):
    if kind == Q.F32:
        model = tiny_model(model_type)
    else:
        model = tiny_model(model_type)
        rounded = [
            (path, mx.array(gguf.dequantize(gguf.quantize(np.array(array), kind), kind)))
            for path, array in mlx_parameters(model)
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
    assert hasattr(loaded.layers[0].mlp.gate_proj, "scales") == (kind in AFFINE)


def test_llama3_frequency_factors_become_rope_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_scaling=scaling, rope_theta=500000.0)
    # The factors as llama.cpp's converter computes them, one dimension pair at a time.
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
    original = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer, *args, **kwargs):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
        return original(writer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        write_gguf(model, tmp_path / "tiny.gguf")
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    loaded, _ = mlx_lm.load(str(folder))
    assert loaded.args.rope_scaling["factor"] == 8.0
    tokens = mx.arange(200)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.factor|longrope"),
        ({"split.count": 3}, "one part of a split"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
    ],
)
def test_what_cannot_be_converted_says_why(extra, message, tmp_path, monkeypatch):
    if "tokenizer.ggml.pre" in extra:
        monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda *_: None)
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file, **extra)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", "starcoder")
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
