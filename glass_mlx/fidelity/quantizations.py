"""The dense model with its weights quantized again, which slicing is compared with."""

import copy
from dataclasses import dataclass

from glass_mlx.models import named_arrays
from glass_mlx.models.precision import dequantize, set_dtype
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

# Round-to-nearest at a number of bits, and mlx-lm's mixed recipes.
QUANTIZATIONS = ("2", "3", "4", "5", "6", "8", *QUANT_RECIPES)

# Bytes are given as a share of those of this quantization, which most models in mlx-community have.
REFERENCE = "4"

_GROUP_SIZE = 64


@dataclass(frozen=True)
class Quantization:
    """A model quantized as `mlx_lm.convert` does it.

    Attributes:
        model: the model, as floats of the quantized values, which a CPU multiplies faster.
        bytes: bytes of weights that the quantized model reads per token.
    """

    model: nn.Module
    bytes: int


def quantize(model: nn.Module, name: str) -> Quantization:
    """Quantize a copy of a model.

    Args:
        model: the model. It may be quantized already; its values are quantized then.
        name: one of `QUANTIZATIONS`.

    Raises:
        ValueError: if the recipe does not suit the model's layers.
    """
    quantized = copy.deepcopy(model)
    dequantize(quantized)
    arrays = (array for _, array in named_arrays(quantized))
    dtype = next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    set_dtype(quantized, mx.bfloat16)  # scales take two bytes, as in published models
    if name in QUANT_RECIPES:
        recipe = mixed_quant_predicate_builder(name, quantized, _GROUP_SIZE)
        quantize_model(quantized, {}, _GROUP_SIZE, None, quant_predicate=recipe)  # type: ignore[arg-type]
    else:
        quantize_model(quantized, {}, _GROUP_SIZE, int(name), quant_predicate=lambda *layer: True)
    read = Session(quantized).weight_bytes
    dequantize(quantized)
    set_dtype(quantized, dtype)
    return Quantization(quantized, read)
