"""Convert a GGUF file into a folder that `mlx_lm.load` reads.

Tensor names and shapes follow the GGUF specification and llama.cpp (src/llama-arch.cpp and
load_arch_tensors of the models in src/models). Quantized tensors keep their integer codes if
MLX's affine mode can hold them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from glass_mlx.checkpoints.gguf_blocks import AFFINE_FORMATS, GROUP_SIZE, repack
from glass_mlx.checkpoints.gguf_config import build_config
from glass_mlx.checkpoints.gguf_file import GGUFFile, GGUFTensor, read_gguf
from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata
from glass_mlx.checkpoints.gguf_tokenizer import write_tokenizer

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType
from tqdm import tqdm

# The formats of vectors, such as the weights of norms.
_FLOAT_FORMATS = {
    GGMLQuantizationType.F64,
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
}

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
_NORMS_OF_HEADS = ("attn_q_norm", "attn_k_norm")
_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Architecture:
    """How mlx-lm represents one of llama.cpp's architectures.

    Attributes:
        model_type: its name in mlx-lm.
        names: module paths in mlx-lm by the names of llama.cpp's tensors.
        biases: the tensors that have biases.
        optional_biases: the tensors that may have biases, by the key of config.json that gives
            biases to all of them.
        has_permuted_rows: whether llama.cpp stores the rows of the query and key projections in
            the order of interleaved rotation.
        has_rope_factors: whether llama.cpp applies frequency factors that the file stores.
        norm_offset: the number that llama.cpp's converter adds to norm weights.
    """

    model_type: str
    names: dict[str, str]
    biases: tuple[str, ...] = ()
    optional_biases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    has_permuted_rows: bool = False
    has_rope_factors: bool = False
    norm_offset: float = 0.0


_QKV = ("attn_q", "attn_k", "attn_v")
# Queries and keys are normalized only in Qwen 3 and Gemma 3.
_WITHOUT_HEAD_NORMS = {k: v for k, v in _NAMES.items() if k not in _NORMS_OF_HEADS}
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        _WITHOUT_HEAD_NORMS,
        optional_biases={
            "attention_bias": (*_QKV, "attn_output"),
            "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
        },
        has_permuted_rows=True,
        has_rope_factors=True,
    ),
    "qwen2": Architecture("qwen2", _WITHOUT_HEAD_NORMS, biases=_QKV),
    "qwen3": Architecture("qwen3", _NAMES),
    "gemma3": Architecture("gemma3_text", _GEMMA_NAMES, norm_offset=1.0),
}


class _Expected(NamedTuple):
    """A tensor that the model has in mlx-lm.

    Attributes:
        module: the path of its module in mlx-lm.
        parameter: its name in the module.
        tensor: llama.cpp's name, without the block and the parameter.
        shape: its shape, rows first.
        is_optional: whether the file may leave it out: biases are zeros then, and the output
            matrix is the embedding.
    """

    module: str
    parameter: str
    tensor: str
    shape: tuple[int, ...]
    is_optional: bool


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
        OSError: if the file cannot be read, or the folder cannot be written.
    """
    try:
        _convert(read_gguf(source), folder, getattr(mx, dtype))
    except GGUFError as error:
        raise ValueError(f"{source} cannot be used: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged file does in other libraries is their own matter
        raise ValueError(
            f"{source} cannot be used: its parts do not fit together ({type(error).__name__})"
        ) from error


def _convert(file: GGUFFile, folder: Path, dtype: mx.Dtype) -> None:
    architecture = _find_architecture(file.metadata)
    blocks = file.metadata.integer(file.metadata.hparam("block_count"), low=1)
    if blocks > len(file.tensors):
        raise GGUFError(f"it has {len(file.tensors)} tensors, too few for {blocks} blocks")
    config = build_config(file.metadata, architecture.model_type, _rope_factors(file))
    config |= _tensor_config(file.tensors, architecture)
    expected = _expected_tensors(config, architecture, _biased(file.tensors))
    _check_tensors(file.tensors, expected, architecture)
    config |= write_tokenizer(file.metadata, folder, rows=config["vocab_size"])
    modules = _convert_tensors(file.tensors, expected, config, architecture, dtype)
    quantization = _write_weights(modules, folder)
    if quantization:
        defaults = {"group_size": GROUP_SIZE, "bits": 4, "mode": "affine"}
        config["quantization"] = defaults | quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _find_architecture(metadata: Metadata) -> Architecture:
    """Return the model's architecture.

    Raises:
        GGUFError: if the file does not hold one whole model of a known architecture.
    """
    kind = metadata.text("general.type", "model")
    if kind != "model":
        raise GGUFError(f"it holds no model: its general.type is {kind!r}")
    if metadata.integer("split.count", 0) > 1:
        raise GGUFError(
            "it is one part of a split GGUF; merge the parts first with llama-gguf-split --merge"
        )
    architecture = ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        raise GGUFError(
            f"it holds a model of architecture {metadata.architecture!r}; "
            f"only {', '.join(ARCHITECTURES)} can be read from GGUF"
        )
    return architecture


def _rope_factors(file: GGUFFile) -> np.ndarray | None:
    tensor = file.tensors.get(_ROPE_FACTORS)
    return None if tensor is None else tensor.dequantize().reshape(-1)


def _tensor_config(tensors: dict[str, GGUFTensor], architecture: Architecture) -> dict[str, Any]:
    """Return the part of config.json that follows from which tensors there are."""
    if _EMBEDDING not in tensors:
        raise GGUFError(f"its tensor {_EMBEDDING} is missing")
    config: dict[str, Any] = {
        "vocab_size": tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": _OUTPUT not in tensors,
    }
    biased = _biased(tensors)
    for key, names in architecture.optional_biases.items():
        config[key] = not biased.isdisjoint(names)
    return config


def _biased(tensors: dict[str, GGUFTensor]) -> set[str]:
    """Return the names, without the block, of the tensors that have a bias in any block."""
    return {name.split(".")[-2] for name in tensors if name.endswith(".bias") and "." in name[:-5]}


def _expected_tensors(
    config: dict[str, Any], architecture: Architecture, biased: set[str]
) -> dict[str, _Expected]:
    """Return the tensors of the model by their names in the file.

    Args:
        config: the contents of config.json.
        architecture: the model's architecture.
        biased: see `_biased`.
    """
    hidden, ffn, head_dim = (
        config[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    matrices = {
        "token_embd": (config["vocab_size"], hidden),
        "output": (config["vocab_size"], hidden),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    # In mlx-lm all of a group have biases, or none.
    groups = [names for key, names in architecture.optional_biases.items() if config[key]]
    with_bias = {*architecture.biases, *(name for names in groups for name in names)}
    expected = {}
    for name, path in architecture.names.items():
        vector = (head_dim if name in _NORMS_OF_HEADS else hidden,)
        shape = matrices.get(name, vector)
        blocks: list[str] = [""]
        if "{}" in path:
            blocks = [f"blk.{i}." for i in range(config["num_hidden_layers"])]
        for i, block in enumerate(blocks):
            module, optional = path.format(i), name == "output"
            expected[f"{block}{name}.weight"] = _Expected(module, "weight", name, shape, optional)
            if name in with_bias:
                optional = name not in biased and name not in architecture.biases
                expected[f"{block}{name}.bias"] = _Expected(
                    module, "bias", name, shape[:1], optional
                )
    return expected


def _check_tensors(
    tensors: dict[str, GGUFTensor], expected: dict[str, _Expected], architecture: Architecture
) -> None:
    """Check that the file has the model's tensors in their shapes, and no others.

    Raises:
        GGUFError: if a tensor is missing, unknown or of another shape.
    """
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS and architecture.has_rope_factors:
            continue
        if name not in expected:
            raise GGUFError(f"its tensor {name} is not part of {architecture.model_type}")
        shape = expected[name].shape
        # A tensor may have more dimensions, of size 1, than it needs.
        if (1,) * (4 - len(shape)) + shape != (1,) * (4 - len(tensor.shape)) + tensor.shape:
            raise GGUFError(f"its tensor {name} has the shape {tensor.shape}, not {shape}")
        if len(shape) == 1 and tensor.kind not in _FLOAT_FORMATS:
            raise GGUFError(f"its tensor {name} is quantized as {tensor.kind.name}, not in floats")
    for name, (module, parameter, _, _, is_optional) in expected.items():
        if not is_optional and name not in tensors:
            raise GGUFError(f"its tensor {name} ({module}.{parameter}) is missing")


def _convert_tensors(
    tensors: dict[str, GGUFTensor],
    expected: dict[str, _Expected],
    config: dict[str, Any],
    architecture: Architecture,
    dtype: mx.Dtype,
) -> Iterator[_Module]:
    """Convert the model's tensors one at a time, in the order of the file."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name in tqdm(tensors, desc="Converting", unit="tensor", leave=False):
        if name == _ROPE_FACTORS:
            continue  # config["rope_scaling"] has them
        module, parameter, tensor, shape, _ = expected[name]
        with np.errstate(all="ignore"):  # what is not finite is found below
            parts, quantization = _convert_tensor(tensors[name], parameter, shape)
        if tensor.endswith("norm"):
            parts = {key: part - architecture.norm_offset for key, part in parts.items()}
        if architecture.has_permuted_rows and tensor in heads:
            parts = {key: _unpermute(part, heads[tensor]) for key, part in parts.items()}
        arrays = {
            key: mx.array(part) if part.dtype == np.uint32 else mx.array(part).astype(dtype)
            for key, part in parts.items()
        }
        _check_finite(name, arrays)
        yield _Module(module, arrays, quantization)
    for name, (module, parameter, _, shape, _) in expected.items():
        if name not in tensors and parameter == "bias":
            yield _Module(module, {parameter: mx.zeros(shape, dtype)}, None)


def _convert_tensor(
    tensor: GGUFTensor, parameter: str, shape: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Return a tensor's arrays in mlx-lm, and its entry in the quantization config."""
    if tensor.kind in AFFINE_FORMATS and len(shape) == 2:
        bits = AFFINE_FORMATS[tensor.kind].bits
        quantization = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        return repack(tensor.data, tensor.kind)._asdict(), quantization
    return {parameter: tensor.dequantize().reshape(shape)}, None


def _check_finite(name: str, arrays: dict[str, mx.array]) -> None:
    """Raise an error if a number of a tensor is infinite or undefined in its new type."""
    for array in arrays.values():
        if array.dtype != mx.uint32 and not mx.isfinite(array).all():
            kind = str(array.dtype).removeprefix("mlx.core.")
            hint = "; dtype bfloat16 or float32 may hold them" if kind == "float16" else ""
            raise GGUFError(f"its tensor {name} has numbers that are not finite in {kind}{hint}")


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
    path = folder / f"model-{index:05}.safetensors"
    try:
        mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written; is the disk full?") from error
    # MLX may not notice that the disk is full.
    if path.stat().st_size < sum(array.nbytes for array in arrays.values()):
        raise OSError(f"{path} is incomplete; is the disk full?")
