"""Build config.json of a converted model from the metadata of a GGUF file.

Which keys there are, and what they mean when they are missing, follows llama.cpp: the names in
src/llama-arch.cpp, `llama_model::load_hparams` in src/llama-model.cpp, and load_arch_hparams of
the models in src/models. A key that is not understood here is refused, because it may change what
the model computes.
"""

import math
from collections.abc import Sequence
from typing import Any

from glass_mlx.checkpoints.gguf_metadata import MAX_INTEGER, GGUFError, Metadata, shorten
from glass_mlx.checkpoints.gguf_rope import freq_base, rope_scaling

import numpy as np

# The one model for which llama.cpp and Google scale queries by another number than head_dim is
# Gemma 3 27B, which has this many blocks.
_GEMMA_27B_BLOCKS = 62

# The activation of the FFN, where it is not SiLU.
_ACTIVATIONS = {"gemma3_text": "gelu_pytorch_tanh"}

# Keys that `build_config` and its callers read, after the architecture's name.
_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Keys that do not change the logits of these architectures in llama.cpp, whatever their value.
_WITHOUT_EFFECT = {
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    # These two say how a sliding window is used; the window itself is checked.
    "attention.sliding_window_pattern",
    "rope.freq_base_swa",
}
# Keys that are accepted only with a value that leaves the computation as it is.
_NEUTRAL: dict[str, tuple[bool | float | str, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "token_shift_count": (0,),
    "use_parallel_residual": (False,),
}


def build_config(metadata: Metadata, model_type: str, factors: np.ndarray | None) -> dict[str, Any]:
    """Return config.json without what follows from the tensors.

    Args:
        metadata: the metadata of the file.
        model_type: the architecture's name in mlx-lm.
        factors: (head_dim / 2,) the frequency factors in a Llama 3 file.

    Raises:
        GGUFError: if the metadata is damaged, or the model has a feature that its architecture in
            mlx-lm lacks.
    """
    key = metadata.hparam
    if metadata.integer(key("expert_count"), 0):
        raise GGUFError("it is a mixture of experts, which is not supported from GGUF")
    blocks = metadata.integer(key("block_count"), low=1)
    context_length = metadata.integer(key("context_length"), low=1)
    sizes = _attention_sizes(metadata, blocks, model_type)
    if factors is not None and 2 * len(factors) != sizes["head_dim"]:
        raise GGUFError(
            f"it has {len(factors)} rotary frequency factors, not one for each pair of the "
            f"{sizes['head_dim']} dimensions of a head"
        )
    config = {
        "model_type": model_type,
        "num_hidden_layers": blocks,
        "intermediate_size": _same_in_all_blocks(metadata, "feed_forward_length", blocks),
        "rms_norm_eps": metadata.number(key("attention.layer_norm_rms_epsilon"), low=0.0),
        "max_position_embeddings": context_length,
        "rope_theta": freq_base(metadata),
        "rope_scaling": rope_scaling(metadata, context_length, factors),
    }
    config |= sizes
    if metadata.architecture == "gemma3":
        config |= _gemma_attention(metadata, config)
    _refuse_other_keys(metadata, config)
    return config


def _same_in_all_blocks(
    metadata: Metadata, name: str, blocks: int, default: int | None = None
) -> int:
    """Return a size that the file gives once, or once for every block.

    Raises:
        GGUFError: if it differs from block to block, which mlx-lm's models do not support.
    """
    key = metadata.hparam(name)
    if key not in metadata or not isinstance(values := metadata.value(key), np.ndarray):
        return metadata.integer(key, default, low=1)
    if len(values) != blocks or values.dtype.kind not in "iu":
        raise GGUFError(f"its {key} is {shorten(values)}, not one integer for each block")
    if np.any(values != values[0]):
        raise GGUFError(f"its {key} differs from block to block, which is not supported")
    if not 1 <= values[0] <= MAX_INTEGER:
        raise GGUFError(f"its {key} is {shorten(values)}, not from 1 to {MAX_INTEGER}")
    return int(values[0])


def _attention_sizes(metadata: Metadata, blocks: int, model_type: str) -> dict[str, int]:
    """Return the sizes of attention, which must fit each other.

    llama.cpp's defaults: as many key-value heads as heads, and heads that share the embedding.
    """
    hidden = metadata.integer(metadata.hparam("embedding_length"), low=1)
    heads = _same_in_all_blocks(metadata, "attention.head_count", blocks)
    kv_heads = _same_in_all_blocks(metadata, "attention.head_count_kv", blocks, heads)
    shared = max(hidden // heads, 1)
    head_dim = metadata.integer(metadata.hparam("attention.key_length"), shared, low=1)
    if heads % kv_heads:
        raise GGUFError(f"its {heads} heads cannot share {kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise GGUFError(f"its heads have {head_dim} dimensions, which cannot be rotated in pairs")
    if model_type == "qwen2" and head_dim * heads != hidden:
        raise GGUFError(
            f"its {metadata.hparam('attention.key_length')} is {head_dim}, but mlx-lm's qwen2 "
            f"only has heads of {hidden} / {heads} dimensions"
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _gemma_attention(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return what only Gemma 3 has; without a sliding window all its blocks see everything."""
    head_dim, blocks = config["head_dim"], config["num_hidden_layers"]
    shared = config["hidden_size"] // config["num_attention_heads"]
    window = metadata.integer(metadata.hparam("attention.sliding_window"), 0)
    return {
        "query_pre_attn_scalar": shared if blocks == _GEMMA_27B_BLOCKS else head_dim,
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": _window_pattern(metadata, blocks) if window else 1,
        "rope_local_base_freq": freq_base(metadata, "rope.freq_base_swa"),
    }


def _window_pattern(metadata: Metadata, blocks: int) -> int:
    """Return which blocks see everything: the last of so many."""
    key = metadata.hparam("attention.sliding_window_pattern")
    if key in metadata and isinstance(slides := metadata.value(key), np.ndarray):
        period = int(np.argmin(slides)) + 1 if len(slides) else 1
        if not np.array_equal(slides, np.arange(1, blocks + 1) % period > 0):
            raise GGUFError(f"its {key} is {shorten(slides)}, which is not supported")
        return period
    return metadata.integer(key, 6, low=1, high=blocks)


def _refuse_other_keys(metadata: Metadata, config: dict[str, Any]) -> None:
    """Refuse every hyperparameter that is not understood, unless its value is neutral."""
    prefix = metadata.hparam("")
    for key in metadata:
        name = key.removeprefix(prefix)
        if name == key or name in _READ or name in _WITHOUT_EFFECT:
            continue
        value = metadata.value(key)
        if name == "attention.sliding_window" and _is_harmless_window(value, config):
            continue
        if not _is_one_of(value, _neutral_values(name, config)):
            raise GGUFError(
                f"its {key} is {shorten(value)}, which is not supported for {config['model_type']}"
            )


def _is_harmless_window(value: Any, config: dict[str, Any]) -> bool:
    """Return whether the model has a sliding window, or this one never hides a token."""
    if "sliding_window" in config:
        return True
    return type(value) is int and not 0 < value < config["max_position_embeddings"]


def _neutral_values(name: str, config: dict[str, Any]) -> Sequence[bool | float | str]:
    """Return the values of a key with which the model computes the same as without it."""
    head_dim = config["head_dim"]
    depending_on_sizes: dict[str, tuple[bool | float | str, ...]] = {
        "attention.scale": (config.get("query_pre_attn_scalar", head_dim) ** -0.5,),
        "attention.value_length": (head_dim,),
        "attention.key_length_swa": (head_dim,),
        "attention.value_length_swa": (head_dim,),
        "embedding_length_out": (0, config["hidden_size"]),
        "rope.dimension_count": (head_dim,),
        "rope.dimension_count_swa": (head_dim,),
        "hidden_activation": (_ACTIVATIONS.get(config["model_type"], "silu"),),
    }
    return (*_NEUTRAL.get(name, ()), *depending_on_sizes.get(name, ()))


def _is_one_of(value: Any, neutral: Sequence[bool | float | str]) -> bool:
    """Return whether a value, or every number of an array, is one of the neutral values."""
    if isinstance(value, np.ndarray):
        return len(value) > 0 and all(_is_one_of(v, neutral) for v in value.tolist())
    if isinstance(value, bool | str | list):
        return any(type(value) is type(n) and value == n for n in neutral)
    numbers = [n for n in neutral if not isinstance(n, bool | str)]
    return any(math.isclose(value, n, rel_tol=1e-6) for n in numbers)
