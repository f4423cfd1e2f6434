"""Convert a GGUF file into a folder that `mlx_lm.load` reads.

Tensor names and metadata follow the GGUF specification and llama.cpp; the `gguf` package reads
the file. Quantized tensors keep their integer codes if MLX's affine mode can hold them.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from glass_mlx.checkpoints.gguf_blocks import AFFINE_FORMATS, GROUP_SIZE, repack
from glass_mlx.checkpoints.gguf_tokenizer import write_tokenizer

import gguf
import mlx.core as mx
import numpy as np
from tqdm import tqdm

# Raise it whenever a conversion's result changes, so that cached conversions are made again.
CONVERTER_VERSION = 2

# A weight file is complete when it holds more bytes than this.
SHARD_BYTES = 4 << 30

# Module paths in mlx-lm by the names of llama.cpp's tensors. `{}` is the layer.
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
_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """How mlx-lm represents one of llama.cpp's architectures.

    Attributes:
        model_type: its name in mlx-lm.
        names: module paths in mlx-lm by the names of llama.cpp's tensors.
        has_permuted_rows: whether llama.cpp stores the rows of the query and key projections in
            the order of interleaved rotation.
        norm_offset: the number that llama.cpp's converter adds to norm weights.
    """

    model_type: str
    names: dict[str, str]
    has_permuted_rows: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture("llama", _NAMES, has_permuted_rows=True),
    "qwen2": Architecture("qwen2", _NAMES),
    "qwen3": Architecture("qwen3", _NAMES),
    "gemma3": Architecture("gemma3_text", _GEMMA_NAMES, norm_offset=1.0),
}


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields
        self.architecture: str = self.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def get_hparam(self, key: str, default: Any = None) -> Any:
        """Return a hyperparameter, whose key in the file starts with the architecture's name.

        Raises:
            ValueError: if the key is missing and there is no default.
        """
        value = self.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the metadata has no {self.architecture}.{key}")
        return value


class _Module(NamedTuple):
    """Arrays of one module of the converted model, and its entry in the quantization config."""

    path: str
    arrays: dict[str, mx.array]
    quantization: dict[str, Any] | None


def convert(source: Path, folder: Path, dtype: str = "float16") -> None:
    """Write an mlx-lm model folder from a GGUF file.

    Args:
        source: the GGUF file.
        folder: an existing, empty folder.
        dtype: "float16", "bfloat16" or "float32", for scales, norms, and weights in a format
            that MLX cannot keep quantized.

    Raises:
        ValueError: if the file is damaged or its model is not supported.
    """
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise ValueError(f"{source} is not a complete GGUF file ({error})") from error
    metadata = Metadata(reader)
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{source} is one part of a split GGUF; merge the parts first")
    architecture = ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        raise ValueError(
            f"{source} holds a model of architecture {metadata.architecture!r}; "
            f"only {', '.join(ARCHITECTURES)} can be read from GGUF"
        )
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _build_config(metadata, tensors)
        config |= write_tokenizer(metadata.get, folder)
        modules = _convert_tensors(reader, config, architecture, getattr(mx, dtype))
        quantization = _write_weights(modules, folder)
    except Exception as error:  # many libraries can notice a damaged file
        raise ValueError(f"{source} cannot be used: {error}") from error
    if quantization:
        defaults = {"group_size": GROUP_SIZE, "bits": 4, "mode": "affine"}
        config["quantization"] = defaults | quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _build_config(metadata: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """Build the contents of config.json.

    Raises:
        ValueError: if the model has a feature that its architecture in mlx-lm lacks.
    """
    hparam = metadata.get_hparam
    if hparam("expert_count", 0):
        raise ValueError("it is a mixture of experts, which is not supported from GGUF")
    hidden, heads = int(hparam("embedding_length")), int(hparam("attention.head_count"))
    head_dim = int(hparam("attention.key_length", 0)) or hidden // heads
    theta = float(hparam("rope.freq_base", 10000.0))
    factors = tensors.get(_ROPE_FACTORS)
    config = {
        "model_type": ARCHITECTURES[metadata.architecture].model_type,
        "hidden_size": hidden,
        "num_hidden_layers": int(hparam("block_count")),
        "intermediate_size": int(hparam("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(hparam("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(np.float32(hparam("attention.layer_norm_rms_epsilon"))),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": int(hparam("context_length")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(hparam, factors.data if factors else None, theta),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    if metadata.architecture == "gemma3":
        # Gemma 3 27B, the model with 62 blocks, scales queries by hidden // heads instead.
        scalar = hidden // heads if config["num_hidden_layers"] == 62 else head_dim
        config |= {
            "query_pre_attn_scalar": scalar,
            "sliding_window": int(hparam("attention.sliding_window")),
            "sliding_window_pattern": int(hparam("attention.sliding_window_pattern", 6)),
            "rope_local_base_freq": float(hparam("rope.freq_base_swa", 10000.0)),
        }
    return config


def _rope_scaling(
    hparam: Callable[..., Any], factors: np.ndarray | None, theta: float
) -> dict[str, Any] | None:
    """Return mlx-lm's `rope_scaling`, or None without scaling.

    Args:
        hparam: see `Metadata.get_hparam`.
        factors: (head_dim / 2,) the frequency factors in a Llama 3 file.
        theta: the base of the rotary frequencies.

    Raises:
        ValueError: if mlx-lm does not have this kind of scaling.
    """
    if factors is not None:
        return _llama3_scaling(factors, theta)
    kind = hparam("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "type": kind, "factor": float(hparam("rope.scaling.factor"))}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        length = hparam("rope.scaling.original_context_length")
        return scaling | {"original_max_position_embeddings": int(length)}
    raise ValueError(f"rope scaling of type {kind!r} is not supported")


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Find Llama 3's scaling constants from the frequency factors that llama.cpp stores.

    The file does not store the constants. All Llama 3 models published so far stretch wavelengths
    above 8192 tokens by the largest factor, leave those below 8192 / 4 unchanged, and interpolate
    in between. The factors that follow from these constants are compared with the stored ones.
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


def _convert_tensors(
    reader: gguf.GGUFReader, config: dict[str, Any], architecture: Architecture, dtype: mx.Dtype
) -> Iterator[_Module]:
    """Convert the file's tensors one at a time."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tqdm(reader.tensors, desc="Converting", unit="tensor", leave=False):
        if tensor.name == _ROPE_FACTORS:
            continue  # config["rope_scaling"] has them
        match = _TENSOR_NAME.fullmatch(tensor.name)
        if match is None or match[2] not in architecture.names:
            raise ValueError(f"its tensor {tensor.name} is not part of {config['model_type']}")
        layer, name, parameter = match.groups()
        kind = tensor.tensor_type
        quantization = None
        if kind in AFFINE_FORMATS:
            parts = repack(tensor.data, kind)._asdict()
            bits = AFFINE_FORMATS[kind].bits
            quantization = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        else:
            values = gguf.dequantize(tensor.data, kind)
            is_norm = name.endswith("norm")
            parts = {parameter: values - architecture.norm_offset if is_norm else values}
        if architecture.has_permuted_rows and name in heads:
            parts = {key: _unpermute(part, heads[name]) for key, part in parts.items()}
        arrays = {
            key: mx.array(part) if part.dtype == np.uint32 else mx.array(part).astype(dtype)
            for key, part in parts.items()
        }
        yield _Module(architecture.names[name].format(layer), arrays, quantization)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of query and key: interleaved pairs back to two halves."""
    halves = rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)


def _write_weights(modules: Iterator[_Module], folder: Path) -> dict[str, Any]:
    """Write modules into shards of about SHARD_BYTES; return their quantization by path."""
    quantization = {}
    shards = 0
    shard: dict[str, mx.array] = {}
    for module in modules:
        mx.eval(module.arrays)
        shard |= {f"{module.path}.{key}": array for key, array in module.arrays.items()}
        if module.quantization:
            quantization[module.path] = module.quantization
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            _write_shard(folder, shards, shard)
            shards, shard = shards + 1, {}
    _write_shard(folder, shards, shard)
    return quantization


def _write_shard(folder: Path, index: int, arrays: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / f"model-{index:05}.safetensors"), arrays, {"format": "mlx"})
