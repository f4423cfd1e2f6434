"""Replacing modules of a model."""

from glass_mlx.models import with_modules
from glass_mlx.models.architectures import tiny_model
from helpers import snapshot

import mlx.nn as nn


def test_replacing_modules_copies_only_their_ancestors():
    model = tiny_model("llama")
    before = snapshot(model)
    down = nn.Linear(128, 64, bias=False)
    other = with_modules(model, {"model.layers.1.mlp": {"down_proj": down}})
    assert other.model.layers[1].mlp.down_proj is down
    assert other.model.layers[1].mlp.up_proj is model.model.layers[1].mlp.up_proj
    assert other.model.layers[0] is model.model.layers[0]
    assert other.model.embed_tokens is model.model.embed_tokens
    assert snapshot(model) == before
