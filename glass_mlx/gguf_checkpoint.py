"""Turn a GGUF file into a folder that `mlx_lm.load` reads.

Block layouts and tensor names follow the GGUF specification and llama.cpp; the `gguf` package
reads the file. Quantized tensors keep their integer codes where MLX's affine mode can hold them:
`w = scale * code + bias` for groups of 32 inputs.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glass_mlx.gguf_tokenizer import write_tokenizer

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Q
from tqdm import tqdm

GROUP = 32
SHARD_BYTES = 4 << 30

Affine = tuple[np.ndarray, np.ndarray, np.ndarray]


def _field(blocks: np.ndarray, start: int, dtype: type, count: int = 1) -> np.ndarray:
    """Read `count` little-endian values at byte `start` of every block: (blocks, count)."""
    stop = start + count * np.dtype(dtype).itemsize
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low halves of all bytes first, then high halves: (..., n) to (..., 2n)."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Bits 4 of the 32 codes of a Q5_0 or Q5_1 block, from the word at byte `start`."""
    return (_field(blocks, start, np.uint32) >> np.arange(32, dtype=np.uint32) & 1) << 4


def _affine_q4_0(blocks: np.ndarray) -> Affine:
    scale = _field(blocks, 0, np.float16).astype(np.float32)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _affine_q4_1(blocks: np.ndarray) -> Affine:
    scale, bias = np.split(_field(blocks, 0, np.float16, 2).astype(np.float32), 2, axis=1)
    return _nibbles(blocks[:, 4:]), scale, bias


def _affine_q5_0(blocks: np.ndarray) -> Affine:
    scale = _field(blocks, 0, np.float16).astype(np.float32)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scale, -16 * scale


def _affine_q5_1(blocks: np.ndarray) -> Affine:
    scale, bias = np.split(_field(blocks, 0, np.float16, 2).astype(np.float32), 2, axis=1)
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), scale, bias


def _affine_q8_0(blocks: np.ndarray) -> Affine:
    scale = _field(blocks, 0, np.float16).astype(np.float32)
    return blocks[:, 2:] ^ 0x80, scale, -128 * scale  # flipping the sign bit adds 128


def _affine_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of the eight groups of a Q4_K or Q5_K block: (blocks, 8) each."""
    d, d_min = np.split(_field(blocks, 0, np.float16, 2).astype(np.float32), 2, axis=1)
    low, mid, high = np.split(blocks[:, 4:16], 3, axis=1)
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return d * scale, -d_min * minimum


def _affine_q4_k(blocks: np.ndarray) -> Affine:
    scale, bias = _affine_k(blocks)
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), scale, bias


def _affine_q5_k(blocks: np.ndarray) -> Affine:
    scale, bias = _affine_k(blocks)
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return codes | fifth << 4, scale, bias


# GGUF types whose values MLX's affine mode holds, with the bits of a code. The products of
# scales in the K types are rounded to the scales' dtype; the others are exact in float16.
AFFINE: dict[Q, tuple[int, Callable[[np.ndarray], Affine]]] = {
    Q.Q4_0: (4, _affine_q4_0),
    Q.Q4_1: (4, _affine_q4_1),
    Q.Q5_0: (5, _affine_q5_0),
    Q.Q5_1: (5, _affine_q5_1),
    Q.Q8_0: (8, _affine_q8_0),
    Q.Q4_K: (4, _affine_q4_k),
    Q.Q5_K: (5, _affine_q5_k),
}


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (rows, columns) into MLX's little-endian bit stream of 32-bit words."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint64)
    for i in range(8):
        words |= codes[:, i::8].astype(np.uint64) << np.uint64(i * bits)
    stream = words.view(np.uint8).reshape(rows, columns // 8, 8)[:, :, :bits]
    return np.ascontiguousarray(stream).reshape(rows, -1).view(np.uint32)


def affine(data: np.ndarray, kind: Q) -> Affine:
    """Repack one quantized GGUF tensor for MLX without changing its codes.

    Args:
        data: the tensor's bytes, (rows, bytes of a row).
        kind: a key of `AFFINE`.

    Returns:
        Weight (rows, columns * bits / 32) uint32, scales and biases (rows, columns / 32) float32.
    """
    bits, unpack = AFFINE[kind]
    rows = data.shape[0]
    codes, scales, biases = unpack(data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]))
    weight = _pack(codes.reshape(rows, -1).astype(np.uint8, copy=False), bits)
    return weight, scales.reshape(rows, -1), biases.reshape(rows, -1)


# Where llama.cpp's tensors live in mlx-lm's models. `{}` is the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
# Gemma has a norm before and after both halves of a block.
_GEMMA_NAMES = _NAMES | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class Metadata:
    """The key-value part of a GGUF file, with keys below the architecture's name."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields
        self.architecture: str = self.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value by its full key."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def arch(self, key: str, default: Any = None) -> Any:
        """Return a value by its key below the architecture's name.

        Raises:
            ValueError: if the key is missing and there is no default.
        """
        value = self.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the metadata has no {self.architecture}.{key}")
        return value


def _rope_scaling(meta: Metadata, factors: np.ndarray | None, theta: float) -> dict | None:
    """Return mlx-lm's `rope_scaling` for what the metadata or Llama 3's factors ask for."""
    if factors is not None:
        return _llama3_scaling(meta, factors, theta)
    kind = meta.arch("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "type": kind, "factor": float(meta.arch("rope.scaling.factor"))}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        length = meta.arch("rope.scaling.original_context_length")
        return scaling | {"original_max_position_embeddings": int(length)}
    raise ValueError(f"rope scaling of type {kind!r} is not supported")


def _llama3_scaling(meta: Metadata, factors: np.ndarray, theta: float) -> dict:
    """Find Llama 3's scaling constants from the frequency factors that llama.cpp stores.

    Every Llama 3 model published so far stretches wavelengths above 8192 tokens by the largest
    factor, leaves those below 8192 / 4 alone, and interpolates in between; the constants are
    not in the file, so the factors that follow from them are compared with the stored ones.
    """
    factor, low, high, length = float(factors.max()), 1.0, 4.0, 8192
    dims = 2 * len(factors)
    wavelength = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise ValueError("its rotary frequency factors are not those of a known Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is written in mlx-lm."""

    model_type: str
    names: dict[str, str]
    permuted: bool = False  # rows of Q and K in llama.cpp's order for interleaved rotation
    norm_offset: float = 0.0  # added to norm weights by llama.cpp's converter


ARCHITECTURES = {
    "llama": Architecture("llama", _NAMES, permuted=True),
    "qwen2": Architecture("qwen2", _NAMES),
    "qwen3": Architecture("qwen3", _NAMES),
    "gemma3": Architecture("gemma3_text", _GEMMA_NAMES, norm_offset=1.0),
}


def _config(meta: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """Build config.json from the metadata.

    Raises:
        ValueError: if the model has something that its architecture in mlx-lm has not.
    """
    if meta.arch("expert_count", 0):
        raise ValueError("it is a mixture of experts, which is not supported from GGUF")
    hidden, heads = int(meta.arch("embedding_length")), int(meta.arch("attention.head_count"))
    head_dim = int(meta.arch("attention.key_length", 0)) or hidden // heads
    theta = float(meta.arch("rope.freq_base", 10000.0))
    factors = tensors.get("rope_freqs.weight")
    config = {
        "model_type": ARCHITECTURES[meta.architecture].model_type,
        "hidden_size": hidden,
        "num_hidden_layers": int(meta.arch("block_count")),
        "intermediate_size": int(meta.arch("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.arch("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(np.float32(meta.arch("attention.layer_norm_rms_epsilon"))),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": int(meta.arch("context_length")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta, factors.data if factors else None, theta),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    if meta.architecture == "gemma3":
        # Gemma 3 27B, with 62 blocks, scales its queries by the width a head would have had.
        scalar = hidden // heads if config["num_hidden_layers"] == 62 else head_dim
        config |= {
            "query_pre_attn_scalar": scalar,
            "sliding_window": int(meta.arch("attention.sliding_window")),
            "sliding_window_pattern": int(meta.arch("attention.sliding_window_pattern", 6)),
            "rope_local_base_freq": float(meta.arch("rope.freq_base_swa", 10000.0)),
        }
    return config


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of Q and K: interleaved pairs back to two halves."""
    out = rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(out).reshape(rows.shape)


def _weights(
    reader: gguf.GGUFReader, config: dict[str, Any], arch: Architecture, dtype: mx.Dtype
) -> Iterator[tuple[str, dict[str, mx.array], dict[str, Any] | None]]:
    """Yield (module path, its arrays, its quantization or None) for every tensor."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tqdm(reader.tensors, desc="Converting", unit="tensor", leave=False):
        if tensor.name == "rope_freqs.weight":
            continue  # stands in config["rope_scaling"]
        match = _TENSOR.fullmatch(tensor.name)
        if match is None or match[2] not in arch.names:
            raise ValueError(f"its tensor {tensor.name} is not part of {config['model_type']}")
        layer, name, part = match.groups()
        path, kind = arch.names[name].format(layer), tensor.tensor_type
        if kind in AFFINE:
            arrays = dict(
                zip(("weight", "scales", "biases"), affine(tensor.data, kind), strict=True)
            )
            quantization = {"group_size": GROUP, "bits": AFFINE[kind][0], "mode": "affine"}
        else:
            value = gguf.dequantize(tensor.data, kind)
            arrays = {part: value - arch.norm_offset if name.endswith("norm") else value}
            quantization = None
        if arch.permuted and name in heads:
            arrays = {k: _unpermute(v, heads[name]) for k, v in arrays.items()}
        packed = {k: mx.array(v) for k, v in arrays.items()}
        yield (
            path,
            {k: v if v.dtype == mx.uint32 else v.astype(dtype) for k, v in packed.items()},
            quantization,
        )


def convert(source: Path, folder: Path, dtype: str = "float16") -> None:
    """Write an mlx-lm model folder from a GGUF file.

    Args:
        source: the GGUF file.
        folder: an existing, empty folder.
        dtype: of scales, norms and of weights in a format that MLX cannot keep quantized:
            "float16", "bfloat16" or "float32".

    Raises:
        ValueError: if the file is damaged or its model is not supported, with the reason.
    """
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise ValueError(f"{source} is not a complete GGUF file ({error})") from error
    meta = Metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if meta.get("split.count", 0) > 1:
        raise ValueError(f"{source} is one part of a split GGUF; merge the parts first")
    arch = ARCHITECTURES.get(meta.architecture)
    if arch is None:
        raise ValueError(
            f"{source} holds a model of architecture {meta.architecture!r}; "
            f"from GGUF only {', '.join(ARCHITECTURES)} can be read"
        )
    try:
        config = _config(meta, tensors)
        config |= write_tokenizer(meta.get, folder)
        shard: dict[str, mx.array] = {}
        shards, held = 0, 0
        quantized: dict[str, dict[str, Any]] = {}
        for path, arrays, quantization in _weights(reader, config, arch, getattr(mx, dtype)):
            mx.eval(arrays)
            shard |= {f"{path}.{part}": array for part, array in arrays.items()}
            held += sum(array.nbytes for array in arrays.values())
            if quantization:
                quantized[path] = quantization
            if held > SHARD_BYTES:
                shards, held, shard = _write_shard(folder, shards, shard), 0, {}
        _write_shard(folder, shards, shard)
    except Exception as error:  # damage shows up in whichever library meets it first
        raise ValueError(f"{source} cannot be used: {error}") from error
    if quantized:
        config["quantization"] = {"group_size": GROUP, "bits": 4, "mode": "affine"} | quantized
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_shard(folder: Path, shards: int, arrays: dict[str, mx.array]) -> int:
    mx.save_safetensors(str(folder / f"model-{shards:05}.safetensors"), arrays, {"format": "mlx"})
    return shards + 1
