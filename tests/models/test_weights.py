"""Fingerprints and sizes of weights."""

from glass_mlx.models import fingerprint, weight_bytes
from glass_mlx.models.architectures import tiny_model

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def test_fingerprints_survive_quantization_and_differ_between_models():
    def cosine(a, b):
        a, b = (np.concatenate([x.ravel() for x in f.values()]) for f in (a, b))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    original = fingerprint(model)
    nn.quantize(model, group_size=32, bits=4)
    assert cosine(original, fingerprint(model)) > 0.99
    assert abs(cosine(original, fingerprint(other))) < 0.2


def test_weight_bytes_exclude_an_embedding_used_only_for_lookup():
    tied, untied = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("llama")
    totals = [sum(a.nbytes for _, a in tree_flatten(m.parameters())) for m in (tied, untied)]
    assert weight_bytes(tied) == totals[0]
    assert weight_bytes(untied) == totals[1] - 256 * 64 * 4
