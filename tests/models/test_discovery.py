"""Finding the FFNs of a model."""

from glass_mlx.models import find_ffns
from glass_mlx.models.architectures import tiny_model

import mlx.core as mx
import mlx.nn as nn
import pytest


def test_ffns_are_found_in_layer_order():
    mx.random.seed(0)
    paths = [ffn.path for ffn in find_ffns(tiny_model("llama"))]
    assert paths == [f"model.layers.{i}.mlp" for i in range(4)]


def test_models_that_cannot_be_sliced_are_refused_with_the_reason():
    model = tiny_model("llama")
    model.model_type = "bitnet"
    with pytest.raises(ValueError, match="normalises over all neurons"):
        find_ffns(model)
    with pytest.raises(ValueError, match="no feed-forward network"):
        find_ffns(nn.Linear(2, 2))
