"""Invariants of slices on quantized models; test_architectures.py covers every architecture."""

from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model
from helpers import QUANTIZATION_MODES, check_invariants

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21], [5, 4, 3, 2, 1, 0, 255]])


@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
def test_invariants_of_a_quantized_model(mode, group, bits):
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    nn.quantize(model, group, bits, mode=mode)
    check_invariants(model, lambda m: m(TOKENS))


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_invariants_of_a_mixed_precision_model(recipe):
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    model, _ = quantize_model(model, {}, 32, 4, quant_predicate=predicate)
    bits = {ffn.contract[1].bits for ffn in find_ffns(model)}
    assert bits == {int(n) for n in recipe.removeprefix("mixed_").split("_")}
    check_invariants(model, lambda m: m(TOKENS))
