"""The data type of a model's weights, and floats in place of quantized and adapted layers."""

from inspect import signature

from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.precision import dequantize, fuse_adapters, set_dtype
from helpers import QUANTIZATION_MODES, add_adapters

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

TOKENS = mx.array([[1, 7, 3, 200, 9]])


def arrays(model):
    return dict(tree_flatten(model.parameters()))


def fills_groups(path, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize(
    ("architecture", "exempt"),
    [
        ("deepseek_v3", ["e_score_correction_bias"]),
        ("nemotron_h", ["e_score_correction_bias", "A_log"]),
        ("kimi_linear", ["e_score_correction_bias", "A_log", "dt_bias"]),
        ("qwen3_5", ["A_log"]),
        ("step3p5", ["router_bias"]),
        ("llama", []),
    ],
)
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_all_weights_are_cast_but_those_that_the_class_exempts(architecture, exempt, mode):
    model = tiny_model(architecture)
    if mode:
        nn.quantize(model, 32, 4, mode=mode, class_predicate=fills_groups)
    before = arrays(model)
    set_dtype(model, mx.bfloat16)
    after = arrays(model)
    kept = {path for path in after if path.rsplit(".")[-1] in exempt}
    assert {path.rsplit(".")[-1] for path in kept} == {*exempt}
    for path, array in after.items():
        if path in kept or not mx.issubdtype(before[path].dtype, mx.floating):
            assert array.dtype == before[path].dtype
            assert mx.array_equal(array, before[path])
        else:
            assert array.dtype == mx.bfloat16
    names = {path.rsplit(".")[-1] for path, a in after.items() if a.dtype == mx.bfloat16}
    assert ("scales" in names) == (mode == "affine")


@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
def test_dequantized_models_compute_the_same(mode, group, bits):
    model = tiny_model("deepseek_v3", hidden_size=128, intermediate_size=256)
    nn.quantize(model, group, bits, mode=mode, class_predicate=_fills(group))
    expected = model(TOKENS)
    state = mx.array(mx.random.state[0])
    dequantize(model, mx.float32)
    assert mx.array_equal(mx.random.state[0], state)
    assert not any("scales" in path for path in arrays(model))
    assert {array.dtype for array in arrays(model).values()} == {mx.float32}
    assert mx.linalg.norm(model(TOKENS) - expected) < 1e-4 * mx.linalg.norm(expected)


def _fills(group):
    def predicate(path, module):
        is_quantizable = hasattr(module, "to_quantized") and "embed_q" not in path
        return is_quantizable and "unembed" not in path and module.weight.shape[-1] % group == 0

    return predicate


@pytest.mark.skipif(
    "global_scale" not in signature(SwitchLinear.to_quantized).parameters,
    reason="mlx-lm 0.31 has no global scales",
)
def test_experts_are_dequantized_with_their_global_scales():
    mx.random.seed(0)
    experts = SwitchLinear(64, 32, 3, bias=True)
    experts.bias = mx.random.normal((3, 32))
    experts.weight = experts.weight * mx.array([1.0, 50.0, 0.01])[:, None, None]
    model = nn.Module()
    model.experts = experts.to_quantized(16, 4, "nvfp4", global_scale=True)
    scales = model.experts.global_scale
    set_dtype(model, mx.bfloat16)
    assert mx.array_equal(model.experts.global_scale, scales)
    dequantize(model, mx.float32)
    assert type(model.experts) is SwitchLinear
    assert mx.array_equal(model.experts.bias, experts.bias.astype(mx.bfloat16))
    for weight, original in zip(model.experts.weight, experts.weight, strict=True):
        assert mx.linalg.norm(weight - original) < 0.12 * mx.linalg.norm(original)


def test_subclasses_stay_quantized_and_go_on_computing_the_same():
    model, options = tiny_model("afm7"), {"group_size": 32, "bits": 4}
    nn.quantize(model, class_predicate=lambda _, m: hasattr(m, "to_quantized") and options)
    expected = model(TOKENS)
    dequantize(model)
    assert type(model.layers[0].self_attn.qkv_proj).__name__ == "FusedQuantizedLinear"
    assert type(model.layers[0].mlp.up_proj) is nn.Linear
    assert mx.linalg.norm(model(TOKENS) - expected) < 1e-4 * mx.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("lora", mode) for mode in (None, "affine", "mxfp4")),
        *(("dora", mode) for mode in (None, "affine")),  # mlx-lm has no DoRA for mxfp4
    ],
)
def test_fused_adapters_compute_the_same(kind, mode):
    model = tiny_model("llama")
    if mode:
        nn.quantize(model, 32, 4, mode=mode)
    keys = ["mlp.down_proj", "self_attn.q_proj", "model.embed_tokens", "lm_head"]
    add_adapters(model, kind, keys if kind == "lora" else keys[:2])
    expected, before = model(TOKENS), arrays(model)
    fuse_adapters(model)
    tolerance = 2e-2 if mode == "mxfp4" else 1e-4  # whose weights become bfloat16
    assert mx.linalg.norm(model(TOKENS) - expected) < tolerance * mx.linalg.norm(expected)
    assert not any("lora" in path for path in arrays(model))
    assert type(model.layers[0].mlp.down_proj) is nn.Linear
    path = "model.layers.0.mlp.up_proj.weight"
    assert mx.array_equal(arrays(model)[path], before[path])


def test_adapters_of_experts_are_fused():
    model = tiny_model("deepseek_v3")
    add_adapters(model, "lora")
    expected = model(TOKENS)
    fuse_adapters(model)
    assert mx.linalg.norm(model(TOKENS) - expected) < 1e-4 * mx.linalg.norm(expected)
    assert not any("lora" in path for path in arrays(model))
