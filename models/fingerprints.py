"""The fingerprint of a model: a small sample of its FFNs' weights, which identifies the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .discovery import find_ffns
from .division import Division, division_of
from .ffn import FFN
from .linear import leading_columns, outputs, rounding_error

# Each FFN is sampled by this many sums over its neurons.
_SUMS = 8

# The sums are taken of this many leading columns.
_COLUMNS = 32

# Two models are related above this cosine of their samples. A model and its 2-bit version have
# 0.92 (SmolLM2-135M, groups of 64); models that were trained separately have about 0.
_MIN_COSINE = 0.87
_MIN_FFN_COSINE = 0.75  # for every single FFN, whose sample is small

# Rounding alone explains differences up to this factor times the expected one.
_ROUNDING_MARGIN = 1.5


@dataclass(frozen=True)
class Fingerprint:
    """A sample of the weights of each FFN.

    Attributes:
        samples: (8, 32) float32 by FFN path: sums with random signs over all neurons, of the first
            32 columns of the FFN's first matrix. Every neuron of every expert counts, in its place.
        rounding: the expected rounding error of these weights; see `linear.rounding_error`.
    """

    samples: Mapping[str, np.ndarray]
    rounding: float

    def similarity(self, other: "Fingerprint") -> float:
        """Return the cosine of two samples; 0 for models that are not related.

        Models are related if one may be a quantization or a fine-tune of the other.
        """
        if {p: s.shape for p, s in self.samples.items()} != {
            p: s.shape for p, s in other.samples.items()
        }:
            return 0.0
        pairs = [
            (sample.ravel().astype(np.float64), other.samples[path].ravel().astype(np.float64))
            for path, sample in self.samples.items()
        ]
        cosine = _cosine(*(np.concatenate(samples) for samples in zip(*pairs, strict=True)))
        is_related = cosine > _MIN_COSINE and all(_cosine(*p) > _MIN_FFN_COSINE for p in pairs)
        return cosine if is_related else 0.0

    def is_same_model(self, other: "Fingerprint") -> bool:
        """Return whether rounding to the two models' precisions explains all differences."""
        difference = np.sqrt(2 * max(0.0, 1 - self.similarity(other)))
        expected = np.hypot(self.rounding, other.rounding)
        return bool(difference <= _ROUNDING_MARGIN * expected)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Sample the weights of each FFN of a model; see `sample_weights`."""
    return sample_weights(find_ffns(model), division_of(model))


def sample_weights(ffns: list[FFN], division: Division | None = None) -> Fingerprint:
    """Sample the weights of each FFN; see `Fingerprint`.

    Args:
        ffns: the FFNs, in a divided model those of this rank.
        division: how the model is divided. All ranks get the fingerprint of the whole model.
    """
    sums = {}
    layers = {ffn.path: [next(iter(m.expand.values())) for m in ffn.members] for ffn in ffns}
    signs = {ffn.path: _signs_of(ffn, division) for ffn in ffns}
    for path, members in layers.items():
        parts = [leading_columns(layer, _COLUMNS).astype(mx.float32) for layer in members]
        columns = mx.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
        sums[path] = mx.array(signs[path]) @ columns
        mx.eval(sums[path])  # one at a time, to hold few weights of a lazily loaded model
    samples = {path: np.array(values) for path, values in sums.items()}
    rounding = max(rounding_error(layer) for members in layers.values() for layer in members)
    return (
        Fingerprint(samples, rounding) if division is None else _joined(samples, rounding, division)
    )


def _joined(samples: dict[str, np.ndarray], rounding: float, division: Division) -> Fingerprint:
    """Return the fingerprint of a divided model from what each rank sampled.

    Args:
        samples: (8, 32) float32 by path, of this rank's neurons.
        rounding: the expected rounding error of this rank's weights.
        division: how the model is divided.
    """
    parts = division.ranks.gather((samples, rounding))
    joined = {
        path: sum(found[1:], found[0]) if path in division.split else found[0]
        for path in division.shapes
        for found in [[part[path] for part, _ in parts if path in part]]
    }
    return Fingerprint(joined, max(error for _, error in parts))


def _signs_of(ffn: FFN, division: Division | None) -> np.ndarray:
    """Return the signs (8, rows) of an FFN's rows in its first matrix, on this rank.

    The rows are those of all experts. Each rank has its own neurons of every expert, and of both
    halves if gate and up are one matrix.
    """
    rows = outputs(next(iter(ffn.expand.values())))
    experts, halves = ffn.experts or 1, 2 if ffn.layout == "halves" else 1
    if division is None or ffn.path not in division.split:
        return _signs(experts * rows)
    whole = _signs(experts * rows * division.ranks.size)
    part = division.part(ffn.path, whole.reshape(_SUMS, experts * halves, -1))
    return part.reshape(_SUMS, -1)


def _signs(neurons: int) -> np.ndarray:
    """Return random signs (8, neurons) float32, the same in every version of numpy."""
    draws = np.random.RandomState(0).randint(0, 2, (_SUMS, neurons))
    return (2 * draws - 1).astype(np.float32)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors; 0 if it is not defined."""
    with np.errstate(all="ignore"):
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return cosine if np.isfinite(cosine) else 0.0
