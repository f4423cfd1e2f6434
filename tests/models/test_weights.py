"""Sizes of weights."""

from glass_mlx.models import find_head, weight_bytes
from glass_mlx.models.architectures import tiny_model
from helpers import add_adapters

import pytest
from mlx.utils import tree_flatten


def test_weight_bytes_exclude_an_embedding_used_only_for_lookup():
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("llama")
    totals = [sum(a.nbytes for _, a in tree_flatten(m.parameters())) for m in (tied, untied)]
    assert weight_bytes(tied, find_head(tied)) == totals[0]
    assert weight_bytes(untied, find_head(untied)) == totals[1] - 256 * 64 * 4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_of_an_adapted_embedding_only_what_is_read_counts(kind):
    model, plain = tiny_model("llama"), tiny_model("llama")
    add_adapters(model, kind, ["model.embed_tokens"])
    assert (
        weight_bytes(model, find_head(model)) - weight_bytes(plain, find_head(plain)) == 4 * 64 * 4
    )  # b, (rank, hidden)
