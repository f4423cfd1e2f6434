"""Sizes of weights."""

from glass_mlx.models import weight_bytes
from glass_mlx.models.architectures import tiny_model

from mlx.utils import tree_flatten


def test_weight_bytes_exclude_an_embedding_used_only_for_lookup():
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("llama")
    totals = [sum(a.nbytes for _, a in tree_flatten(m.parameters())) for m in (tied, untied)]
    assert weight_bytes(tied) == totals[0]
    assert weight_bytes(untied) == totals[1] - 256 * 64 * 4
