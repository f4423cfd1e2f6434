"""Translate a GGUF file's rotary scaling into mlx-lm's `rope_scaling`.

Keys and defaults are those of `llama_model::load_hparams` in llama.cpp's src/llama-model.cpp and
of the constructor in src/llama-context.cpp.
"""

from typing import Any

from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata

import numpy as np

DEFAULT_FREQ_BASE = 10000.0

# The types of scaling that mlx-lm computes as llama.cpp does.
_TYPES = ("none", "linear", "yarn")
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def freq_base(metadata: Metadata, name: str = "rope.freq_base") -> float:
    """Return the base of the rotary frequencies."""
    base = metadata.number(metadata.hparam(name), DEFAULT_FREQ_BASE)
    if base <= 1:
        raise GGUFError(f"its {metadata.hparam(name)} is {base}, not a number above 1")
    return base


def rope_scaling(
    metadata: Metadata, context_length: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """Return mlx-lm's `rope_scaling`, or None without scaling.

    Args:
        metadata: the metadata of the file.
        context_length: the number of positions that the model was trained for.
        factors: (head_dim / 2,) the frequency factors in a Llama 3 file.

    Raises:
        GGUFError: if mlx-lm does not have this kind of scaling.
    """
    kind = metadata.text(metadata.hparam("rope.scaling.type"), "linear")
    if kind not in _TYPES:
        raise GGUFError(
            f"its {metadata.hparam('rope.scaling.type')} is {kind!r}, "
            f"which is not supported, but only {', '.join(_TYPES)}"
        )
    _check_attention_factors(metadata, kind)
    factor = 1.0 if kind == "none" else _factor(metadata)
    if factors is not None:
        if factor != 1:
            raise GGUFError(
                f"it has both frequency factors and a {metadata.hparam('rope.scaling.factor')} "
                f"of {factor}, which mlx-lm cannot combine"
            )
        return _llama3_scaling(factors, freq_base(metadata))
    if factor == 1:
        return None
    scaling = {"rope_type": kind, "type": kind, "factor": factor}
    return scaling | _yarn_parameters(metadata, context_length) if kind == "yarn" else scaling


def _factor(metadata: Metadata) -> float:
    """Return how much positions are compressed; zero in the file means not at all."""
    key = metadata.hparam("rope.scaling.factor")
    if key not in metadata:
        key = metadata.hparam("rope.scale_linear")  # the name until 2023
    return metadata.number(key, 0.0, low=0.0) or 1.0


def _yarn_parameters(metadata: Metadata, context_length: int) -> dict[str, float]:
    key = metadata.hparam("rope.scaling.original_context_length")
    parameters: dict[str, float] = {
        "original_max_position_embeddings": metadata.integer(key, context_length) or context_length
    }
    for name, default in _YARN_BETAS.items():
        value = metadata.number(metadata.hparam(f"rope.scaling.yarn_{name}"), default)
        if value <= 0:
            key = metadata.hparam(f"rope.scaling.yarn_{name}")
            raise GGUFError(f"its {key} is {value}, not a number above 0")
        if value != default:
            parameters[name] = value
    return parameters


def _check_attention_factors(metadata: Metadata, kind: str) -> None:
    """Refuse factors on queries and keys that differ from those which mlx-lm computes itself."""
    mixes = 1.0 if kind == "yarn" else 0.0
    usual_values = {
        "attn_factor": (1.0,),
        "yarn_attn_factor": (1.0,),
        "yarn_ext_factor": (mixes, -1.0),  # -1 means that the type decides
        "yarn_log_multiplier": (0.0,),
    }
    for name, usual in usual_values.items():
        key = metadata.hparam(f"rope.scaling.{name}")
        value = metadata.number(key, usual[0])
        if value not in usual:
            raise GGUFError(f"its {key} is {value}, but mlx-lm only supports {usual[0]}")


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Find Llama 3's scaling constants from the frequency factors that llama.cpp stores.

    The file does not store the constants. All Llama 3 models published so far stretch wavelengths
    above 8192 tokens by the largest factor, leave those below 8192 / 4 unchanged, and interpolate
    in between. The factors that follow from these constants are compared with the stored ones.
    """
    if np.all(factors == 1):
        return None
    factor, low, high, length = float(factors.max()), 1.0, 4.0, 8192
    dims = 2 * len(factors)
    wavelength = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
    is_known = factor >= 1 and np.isfinite(factor)
    if not is_known or not np.allclose(
        1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3, atol=0
    ):
        raise GGUFError("its rotary frequency factors are not those of a known Llama 3 model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
