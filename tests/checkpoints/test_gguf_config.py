"""Hyperparameters of GGUF files: defaults, rotary scaling, and what is refused.

Expected values are those of llama.cpp (src/llama-model.cpp, src/models).
"""

import json

from glass_mlx.checkpoints.gguf import convert
from glass_mlx.checkpoints.gguf_config import build_config
from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata
from glass_mlx.models.architectures import tiny_model
from helpers import write_gguf

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

HPARAMS = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 4,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def config_of(architecture="llama", factors=None, **hparams):
    """Return the configuration that follows from `HPARAMS` with changes; None leaves a key out."""
    values = {k.replace("__", "."): v for k, v in (HPARAMS | hparams).items() if v is not None}
    metadata = {f"{architecture}.{name}": value for name, value in values.items()}
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    metadata = Metadata({"general.architecture": architecture} | metadata)
    return build_config(metadata, model_type, factors)


def test_missing_keys_have_the_defaults_of_llama_cpp():
    config = config_of()
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 16
    assert config["rope_theta"] == 10000
    assert config["rope_scaling"] is None
    gemma = config_of("gemma3", attention__sliding_window=32, block_count=6)
    assert gemma["sliding_window_pattern"] == 6
    assert gemma["rope_local_base_freq"] == 10000
    assert gemma["query_pre_attn_scalar"] == 16


@pytest.mark.parametrize("missing", HPARAMS)
def test_a_missing_key_without_a_default_is_named(missing):
    with pytest.raises(GGUFError, match=f"its metadata has no llama.{missing}"):
        config_of(**{missing: None})


LINEAR = {"rope_type": "linear", "type": "linear", "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("hparams", "scaling"),
    [
        ({"scaling__type": "linear", "scaling__factor": 4.0}, LINEAR),
        ({"scaling__factor": 4.0}, LINEAR),
        ({"scaling__factor": 4}, LINEAR),
        ({"scale_linear": 4.0}, LINEAR),
        ({"scaling__type": "linear", "scale_linear": 4.0}, LINEAR),
        ({"scaling__factor": 4.0, "scale_linear": 8.0}, LINEAR),
        ({"scaling__factor": 0.0, "scale_linear": 8.0}, None),
        ({"scaling__type": "linear", "scaling__factor": 0.0}, None),
        ({"scaling__type": "linear", "scaling__factor": 1.0}, None),
        ({"scaling__type": "linear"}, None),
        ({"scaling__type": "none", "scaling__factor": 4.0}, None),
        ({"scaling__type": "none", "scale_linear": 4.0}, None),
        ({"scaling__type": "yarn"}, None),
        ({"scaling__type": "yarn", "scaling__factor": 0.0}, None),
        ({"scaling__type": "yarn", "scaling__factor": 4.0}, YARN),
        ({"scaling__type": "yarn", "scale_linear": 4.0}, YARN),
        (
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__original_context_length": 0,
            },
            YARN,
        ),
        (
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__original_context_length": 128,
                "scaling__attn_factor": 1.0,
                "scaling__yarn_ext_factor": 1.0,
                "scaling__yarn_beta_fast": 16.0,
                "scaling__yarn_beta_slow": 2.0,
                "scaling__finetuned": True,
            },
            YARN | {"original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(hparams, scaling):
    assert config_of(**{f"rope__{k}": v for k, v in hparams.items()})["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"type": "longrope"}, r"llama.rope.scaling.type is 'longrope', which is not supported"),
        ({"type": "dynamic", "factor": 2.0}, r"llama.rope.scaling.type is 'dynamic'"),
        ({"type": 2}, r"llama.rope.scaling.type is 2, not a string"),
        ({"factor": -2.0}, r"llama.rope.scaling.factor is -2.0, not a number of 0.0 or more"),
        ({"factor": np.nan}, r"llama.rope.scaling.factor is nan"),
        ({"factor": "4"}, r"llama.rope.scaling.factor is '4', not a number"),
        ({"attn_factor": 1.19}, r"llama.rope.scaling.attn_factor is 1.19"),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 0.5}, "yarn_attn_factor is 0.5"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.0}, "yarn_ext_factor is 0.0"),
        ({"type": "linear", "factor": 4.0, "yarn_ext_factor": 1.0}, "yarn_ext_factor is 1.0"),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
        ({"type": "yarn", "factor": 4.0, "yarn_beta_fast": 0.0}, "yarn_beta_fast is 0.0"),
        ({"alpha": 1000.0}, "rope.scaling.alpha is 1000.0"),
    ],
)
def test_rope_scaling_that_mlx_lm_lacks_is_refused(hparams, message):
    with pytest.raises(GGUFError, match=message):
        config_of(**{f"rope__scaling__{k}": v for k, v in hparams.items()})


def llama3_factors(factor: float) -> np.ndarray:
    """Return one factor for each pair of 16 dimensions, as llama.cpp's converter computes them."""
    factors = []
    for i in range(0, 16, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 16)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_frequency_factors_become_rope_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_scaling=scaling, rope_theta=500000.0)
    write_gguf(model, tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": llama3_factors(8.0)})
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    loaded, _ = mlx_lm.load(str(folder))
    tokens = mx.arange(200)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)


def test_other_frequency_factors_are_refused():
    theta = {"rope__freq_base": 500000.0}
    assert config_of(factors=np.ones(8, np.float32), **theta)["rope_scaling"] is None
    scaled = llama3_factors(8.0)
    assert config_of(factors=scaled, **theta)["rope_scaling"]["factor"] == 8
    for factors in (scaled[::-1], -scaled, scaled * np.nan, np.full(8, 2.0)):
        with pytest.raises(GGUFError, match="not those of a known Llama 3"):
            config_of(factors=factors, **theta)
    with pytest.raises(
        GGUFError, match="4 rotary frequency factors, not one for each pair of the 16"
    ):
        config_of(factors=scaled[:4], **theta)
    with pytest.raises(GGUFError, match=r"both frequency factors and a llama.rope.scaling.factor"):
        config_of(factors=scaled, rope__scaling__factor=4.0, **theta)


@pytest.mark.parametrize(
    ("architecture", "hparams"),
    [
        ("llama", {"expert_count": 0, "expert_used_count": 0, "vocab_size": 7}),
        ("llama", {"attention__scale": 0.25, "attention__value_length": 16}),
        ("llama", {"attention__scale": 0.0, "logit_scale": 1.0, "residual_scale": 1.0}),
        ("llama", {"embedding_scale": 1.0, "attn_logit_softcapping": 0.0}),
        ("llama", {"final_logit_softcapping": 0.0, "use_parallel_residual": False}),
        ("llama", {"attention__causal": True, "attention__clamp_kqv": 0.0}),
        ("llama", {"rope__dimension_count": 16, "tensor_data_layout": "Meta AI original pth"}),
        ("llama", {"attention__sliding_window": 0}),
        ("llama", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2}),
        ("llama", {"attention__layer_norm_epsilon": 1e-5, "attention__max_alibi_bias": 0.0}),
        ("llama", {"hidden_activation": "silu", "attention__head_count_kv": 2}),
        ("qwen3", {"attention__key_length": 32, "attention__value_length": 32, "pooling_type": 3}),
        ("qwen2", {"attention__key_length": 16, "rope__scaling__finetuned": False}),
        ("gemma3", {"attention__key_length": 32, "attention__scale": 32**-0.5}),
        ("gemma3", {"final_logit_softcapping": 0.0, "hidden_activation": "gelu_pytorch_tanh"}),
    ],
)
def test_keys_with_their_usual_values_are_accepted(architecture, hparams):
    assert config_of(architecture, **hparams)["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("architecture", "hparams", "message"),
    [
        ("llama", {"expert_count": 8}, "it is a mixture of experts"),
        ("llama", {"expert_used_count": 2}, "llama.expert_used_count is 2, which is not supported"),
        ("llama", {"attention__scale": 0.5}, "llama.attention.scale is 0.5"),
        ("llama", {"attention__value_length": 32}, "llama.attention.value_length is 32"),
        ("llama", {"rope__dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ("llama", {"logit_scale": 0.1}, "llama.logit_scale is 0.1"),
        ("llama", {"residual_scale": 0.22}, "llama.residual_scale is 0.22"),
        ("llama", {"embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
        ("llama", {"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping is 50.0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping is 30.0"),
        ("llama", {"attention__clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        ("llama", {"attention__max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias is 8.0"),
        ("llama", {"attention__causal": False}, "llama.attention.causal is False"),
        ("llama", {"use_parallel_residual": True}, "llama.use_parallel_residual is True"),
        ("llama", {"use_parallel_residual": 0}, "llama.use_parallel_residual is 0"),
        ("qwen3", {"attention__sliding_window": 128}, "qwen3.attention.sliding_window is 128"),
        ("llama", {"nextn_predict_layers": 1}, "llama.nextn_predict_layers is 1"),
        ("llama", {"an_unheard_of_scale": 1.0}, "llama.an_unheard_of_scale is 1.0"),
        ("llama", {"hidden_activation": "gelu"}, "llama.hidden_activation is 'gelu'"),
        ("llama", {"rope__freq_base": 1.0}, "llama.rope.freq_base is 1.0, not a number above 1"),
        ("qwen2", {"attention__key_length": 32}, "mlx-lm's qwen2 only has heads of 64 / 4"),
        ("llama", {"attention__head_count_kv": 3}, "4 heads cannot share 3 key-value heads"),
        ("llama", {"attention__key_length": 15}, "heads have 15 dimensions"),
        ("gemma3", {"attention__sliding_window": 32}, "sliding_window_pattern is 6, not an int"),
        ("llama", {"block_count": 0}, "llama.block_count is 0, not an integer from 1"),
        ("llama", {"block_count": -4}, "llama.block_count is -4, not an integer from 1"),
        ("llama", {"block_count": 4.0}, "llama.block_count is 4.0, not an integer"),
        ("llama", {"block_count": True}, "llama.block_count is True, not an integer"),
        ("llama", {"block_count": "4"}, "llama.block_count is '4', not an integer"),
        ("llama", {"embedding_length": 2**40}, "llama.embedding_length is 1099511627776, not"),
        ("llama", {"context_length": ["a"] * 99}, r"llama.context_length is \['a', .*\.\.\., not"),
        (
            "llama",
            {"attention__layer_norm_rms_epsilon": -1.0},
            "epsilon is -1.0, not a number of 0",
        ),
        ("llama", {"attention__layer_norm_rms_epsilon": np.inf}, "epsilon is inf, not a number"),
    ],
)
def test_keys_that_change_the_computation_are_refused(architecture, hparams, message):
    with pytest.raises(GGUFError, match=message) as error:
        config_of(architecture, **hparams)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name", ["feed_forward_length", "attention.head_count", "attention.head_count_kv"]
)
def test_sizes_may_be_given_for_every_block_if_they_agree(name):
    key = name.replace(".", "__")
    base = {"attention__head_count_kv": 4}
    assert config_of(**(base | {key: np.full(4, 4, np.int32)})) == config_of(**(base | {key: 4}))
    for wrong, message in (
        (np.array([4, 4, 4, 2]), "differs from block to block"),
        (np.array([4, 4, 4]), "not one integer for each block"),
        (np.full(4, 4.0), "not one integer for each block"),
        (np.zeros(4, np.int32), "not from 1 to"),
    ):
        with pytest.raises(GGUFError, match=f"its llama.{name} .*{message}"):
            config_of(**(base | {key: wrong}))


def test_gemma_windows():
    window = {"attention__sliding_window": 32}
    no_window = config_of("gemma3", attention__sliding_window_pattern=2)
    assert no_window["sliding_window_pattern"] == 1
    pattern = np.array([True, False, True, False])
    for value in (2, pattern):
        config = config_of("gemma3", attention__sliding_window_pattern=value, **window)
        assert (config["sliding_window"], config["sliding_window_pattern"]) == (32, 2)
    for value in (~pattern, pattern[:3], np.array([True] * 4)):
        with pytest.raises(GGUFError, match="sliding_window_pattern is"):
            config_of("gemma3", attention__sliding_window_pattern=value, **window)


def test_gemma_without_a_window_sees_everything(tmp_path):
    model = tiny_model("gemma3_text", sliding_window_pattern=1)
    write_gguf(model, tmp_path / "tiny.gguf", **{"gemma3.attention.sliding_window": None})
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    loaded, _ = mlx_lm.load(str(folder))
    tokens = mx.arange(100)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)


def test_yarn_without_an_original_length_computes_as_with_the_context_length(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    model = tiny_model("llama", rope_scaling=scaling)
    metadata = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    write_gguf(model, tmp_path / "tiny.gguf", **metadata)
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, "float32")
    loaded, _ = mlx_lm.load(str(folder))
    tokens = mx.arange(100)[None]
    assert mx.allclose(loaded(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert not mx.allclose(loaded(tokens), tiny_model("llama")(tokens), rtol=1e-2, atol=1e-2)
