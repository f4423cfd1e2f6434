"""Tiny random models of all of mlx-lm's architectures, and which of their FFNs can be sliced."""

import contextlib
import importlib
import importlib.util
import io
import pkgutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_unflatten

from . import find_ffns, named_arrays

_LAYERS = 4
_OLMO_TOKENIZER = "hf_olmo"
_ROPE = {"type": "default", "rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}

# Values that the architectures' configurations have in common. Each architecture uses those that
# its configuration has.
COMMON: dict[str, Any] = {
    # sizes
    "vocab_size": 256,
    "hidden_size": 64,
    "n_embd": 64,
    "model_dim": 64,
    "intermediate_size": 128,
    "shared_intermediate_size": 64,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layer": _LAYERS,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "n_positions": 256,
    "tie_word_embeddings": False,
    # attention
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "attention_bias": False,
    "qkv_bias": False,
    "use_qk_norm": True,
    "query_pre_attn_scalar": 16,
    "attention_multiplier": 1.0,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "layer_types": ["full_attention"] * _LAYERS,
    # norms, scales and biases
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "scale_depth": 1.4,
    "scale_emb": 1.0,
    "dim_model_base": 64,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "hidden_act": "silu",
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    # recurrent layers
    "layer_group_size": 2,
    "group_norm_size": 2,
    "conv_L_cache": 3,
    "conv_kernel": 4,
    "conv_bias": False,
    "use_conv_bias": True,
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 4,
    "time_step_limit": (0.001, 100.0),
    "n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}

_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 1,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 64,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

# Values that differ from the common ones. A text_config that is a string names the architecture
# whose configuration it takes.
PARTICULAR: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "hidden_dim_scale_factor": 2.0, "num_kv_reuse_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "dbrx": {
        "d_model": 64,
        "n_layers": _LAYERS,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy"},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True], "layer_types": _SLIDING},
    "gemma3": {"text_config": "gemma3_text"},
    "gemma3n": {
        "text_config": {
            "intermediate_size": [128] * _LAYERS,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 256,
            "altup_num_inputs": 2,
            "altup_active_idx": 0,
            "altup_correct_scale": True,
            "altup_coef_clip": 120.0,
            "num_kv_shared_layers": 1,
            "laurel_rank": 8,
            "layer_types": _SLIDING,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
        }
    },
    "gemma4": {"text_config": "gemma4_text"},
    "gemma4_text": {
        "num_kv_shared_layers": 1,
        "layer_types": _SLIDING,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 256,
        "global_head_dim": 16,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": _ROPE,
    },
    "gpt2": {"n_ctx": 256},
    "gpt_bigcode": {"n_inner": 128},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt_oss": {"layer_types": _SLIDING},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": "deepseek_v3"},
    "kimi_k3": {
        "text_config": {
            "hidden_act": "situ",
            "linear_attn_config": _KDA,
            "num_experts_per_token": 2,
        }
    },
    "kimi_linear": {
        "linear_attn_config": _KDA,
        "model_max_length": 256,
        "num_experts_per_token": 2,
    },
    "kimi_vl": {"text_config": "deepseek_v3"},
    "lfm2": {
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "lfm2-vl": {"text_config": "lfm2"},
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", "full_attention"] * 2},
    "lille-130m": {"block_size": 256, "n_kv_heads": 2},
    "llama4": {
        "text_config": {
            "attention_chunk_size": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "rope_scaling": None,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mellum": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
    },
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        }
    },
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1, 1, 1],
            "dense_intermediate_size": 128,
            "layer_types": None,
            "index_n_heads": None,
        }
    },
    "ministral3": {"rope_parameters": _YARN},
    "mistral3": {"text_config": "ministral3"},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {
        "text_config": {
            "post_norm_eps": 1e-5,
            "rope_parameters": _ROPE,
            "layer_rope_theta": [10000.0] * _LAYERS,
            "layer_types": _SLIDING,
            "final_logit_softcapping": 30.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 64,
            "num_shared_experts": 0,
        }
    },
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 3.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "-", "*", "E"],
        "layer_types": None,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
    },
    "olmo": {
        "d_model": 64,
        "n_layers": _LAYERS,
        "mlp_hidden_size": 256,
        "n_heads": 4,
        "embedding_size": 256,
    },
    "olmo3": {"layer_types": _SLIDING},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
    },
    "openelm": {
        "num_transformer_layers": _LAYERS,
        "ffn_dim_divisor": 32,
        "ffn_multipliers": [1.0, 2.0, 3.0, 4.0],
        "num_query_heads": [4] * _LAYERS,
        "num_kv_heads": [2] * _LAYERS,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 128,
        "gegelu_limit": 20.0,
    },
    "pixtral": {"text_config": "llama"},
    "plamo": {"n_shared_head": 2},
    "prism_hadamard_qwen35": {
        "text_config": {"num_experts": 0},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": f"model.layers.{layer}.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
            for layer in range(_LAYERS)
        ],
    },
    "qwen": {"kv_channels": 16, "intermediate_size": 256},
    "qwen3_5": {"num_experts": 0},
    "qwen3_vl_moe": {"text_config": "qwen3_moe"},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 4,
        "attention_window_size": 8,
        "logits_soft_cap": 30.0,
        "intermediate_size": 256,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {
        "layer_types": _SLIDING,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "hidden_act": "gelu",
    },
    "stablelm": {"use_qkv_bias": False},
    "step3p5": {
        "layer_types": _SLIDING,
        "num_attention_groups": 2,
        "moe_top_k": 2,
        "share_expert_dim": 64,
    },
}


@dataclass(frozen=True)
class Architecture:
    """An architecture, and whether it can be sliced.

    Attributes:
        architecture: the name of mlx-lm's module.
        ffn: the forms of its FFNs.
        sites: the number of FFNs that can be sliced in its tiny model with four layers.
        supported: whether it can be sliced.
        reason: the reason why not, or "".
    """

    architecture: str
    ffn: str
    sites: int
    supported: bool
    reason: str


def names() -> list[str]:
    """List the names of all architectures of the installed mlx-lm."""
    modules = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in modules if _defines_model(name)]


def _defines_model(name: str) -> bool:
    try:
        module = _module(name)
    except ImportError:
        return True
    return hasattr(module, "ModelArgs") and hasattr(module, "Model")


def _module(name: str) -> Any:
    """Import mlx-lm's module of an architecture; raise ImportError if a package is missing.

    The module of olmo ends the process without a package that its tokenizer needs. A tiny model has
    no tokenizer, so an empty module takes the package's place.
    """
    if _OLMO_TOKENIZER not in sys.modules and importlib.util.find_spec(_OLMO_TOKENIZER) is None:
        sys.modules[_OLMO_TOKENIZER] = types.ModuleType(_OLMO_TOKENIZER)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit as error:
        raise ImportError(output.getvalue().strip()) from error


def configuration(name: str) -> dict[str, Any]:
    """Return the configuration of an architecture's tiny model."""
    config = COMMON | PARTICULAR.get(name, {}) | {"model_type": name}
    text = config.get("text_config")
    if isinstance(text, str):
        config["text_config"] = configuration(text)
    elif text is not None:
        config["text_config"] = COMMON | text | {"model_type": name}
    return config


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Build a random float32 model of an architecture.

    Args:
        name: the architecture.
        seed: the seed of the weights.
        changes: values that replace those of `configuration`.

    Raises:
        ImportError: if the architecture needs a package that is not installed.
    """
    module = _module(name)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(configuration(name) | changes))
    # Matrices that are initialized to zero would hide what the rest of the model computes.
    zero = [(path, a) for path, a in named_arrays(model) if a.ndim > 1 and not a.any()]
    model.update(tree_unflatten([(path, 0.1 * mx.random.normal(a.shape)) for path, a in zero]))
    model.eval()
    mx.eval(model.parameters())
    return model


def survey() -> Iterator[Architecture]:
    """Yield every architecture, with whether its tiny model can be sliced."""
    for name in names():
        try:
            model = tiny_model(name)
        except Exception as error:  # every architecture fails in its own way
            reason = " ".join(str(error).split())
            yield Architecture(name, "", 0, False, f"no tiny model of it can be made: {reason}")
            continue
        try:
            ffns, reason = find_ffns(model), ""
        except ValueError as error:
            ffns, reason = [], str(error).partition(": ")[2]
        kinds = dict.fromkeys(ffn.kind for ffn in ffns)
        yield Architecture(name, ", ".join(kinds), len(ffns), not reason, reason)
