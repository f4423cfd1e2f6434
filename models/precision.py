"""The precision of a model's weights: their data type, and floats in place of other formats."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .adapters import bias_of, is_adapted
from .linear import dense_weight, experts

# Layers of floats by the quantized layers that they replace.
_FLOAT_LAYERS: dict[type, type[nn.Module]] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
}

# Multiplies the scales of a quantized layer. It is float32 whatever a model computes in.
_GLOBAL_SCALE = "global_scale"


def set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Convert the floating-point weights of a model in place.

    As in `mlx_lm.convert`, the model's class may exempt weights by `cast_predicate`, such as
    routing biases and state decays, which need float32.
    """
    may_cast = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        is_exempt = path.endswith(_GLOBAL_SCALE) or not may_cast(path)
        return array.astype(dtype) if is_float and not is_exempt else array

    model.update(tree_map_with_path(cast, model.parameters()))


def dequantize(model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Replace the quantized layers of a model in place by layers of floats.

    Subclasses of MLX's layers may compute something else, and stay quantized.

    Args:
        model: the model.
        dtype: the type of the weights of formats whose scales are not floats. Default: bfloat16,
            which holds these weights exactly.
    """
    layers = [
        (path, _float_layer(module, dtype))
        for path, module in model.named_modules()
        if type(module) in _FLOAT_LAYERS
    ]
    model.update_modules(tree_unflatten(layers))


def fuse_adapters(model: nn.Module) -> None:
    """Replace adapted layers of a model in place by layers of floats that compute the same."""
    layers = [
        (path, _fused_layer(module))
        for path, module in model.named_modules()
        if hasattr(module, "lora_a") and hasattr(module, "fuse")
    ]
    model.update_modules(tree_unflatten(layers))


def _fused_layer(module: nn.Module) -> nn.Module:
    if is_adapted(module):
        kind = nn.Linear if experts(module) is None else SwitchLinear
        return _layer(kind, dense_weight(module), bias_of(module))
    fused: nn.Module = module.fuse(dequantize=True)
    return fused


def _float_layer(module: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
    weight = _float_weight(module, dtype if module.scales.dtype == mx.uint8 else None)
    return _layer(_FLOAT_LAYERS[type(module)], weight, module.get("bias"))


def _layer(kind: type[nn.Module], weight: mx.array, bias: mx.array | None) -> nn.Module:
    """Make a layer with given weights. The constructor would draw random ones."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _float_weight(module: nn.Module, dtype: mx.Dtype | None) -> mx.array:
    """Return the weights of a quantized layer as floats."""
    options: dict[str, Any] = {
        "group_size": module.group_size,
        "bits": module.bits,
        "mode": module.mode,
        "dtype": dtype,
    }
    global_scales = module.get(_GLOBAL_SCALE)
    if global_scales is None:
        return mx.dequantize(module.weight, module.scales, module.get("biases"), **options)
    experts = zip(module.weight, module.scales, global_scales, strict=True)
    return mx.stack(
        [mx.dequantize(w, scales, global_scale=scale, **options) for w, scales, scale in experts]
    )
