"""The global prior of a model: scores of its neurons, measured once and stored in one file.

The file is safetensors. For every FFN and statistic it has the raw scores, `<path>.<statistic>`,
and their standard deviation over sequences, `<path>.<statistic>_spread`, both float32 (m,), and
for every FFN `<path>.fingerprint`, a few of the model's own weights. `about` in its metadata
(see `files.write_tensors`) has model, recipes, settings, stability, versions, ...; there is no date
in it: what is measured again in the same way is the same file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from glass_mlx.files import cache_folder, one_line, read_tensors, write_tensors

import numpy as np
from safetensors import safe_open

FORMAT = "glass-prior-2"
FILE_NAME = "glass_prior.safetensors"
BUILD_COMMAND = "python tools/build_priors.py --model {model} --output glass_prior.safetensors"
_SAMPLE = "fingerprint"
_SPREAD = "_spread"

# The cosine of fingerprints of one model (SmolLM2-135M, requantized in groups of 64) is 0.996
# at 4 bits, 0.925 at 2 bits. Those of two models trained apart have nothing in common.
_SAME_MODEL = 0.8


def _same_weights(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Whether two fingerprints are of one model, in whatever precision."""
    if any(ours[path].shape != theirs[path].shape for path in ours):
        return False
    a, b = (
        np.concatenate([sample[path].ravel() for path in ours]).astype(np.float64)
        for sample in (ours, theirs)
    )
    return bool(a @ b > _SAME_MODEL * np.linalg.norm(a) * np.linalg.norm(b))


@dataclass(frozen=True)
class GlobalPrior:
    """How important each neuron of a model is in general.

    Attributes:
        scores: for each statistic, the scores (m,) float32 of each FFN by its path.
        fingerprint: a sample of the weights of each FFN, see `models.fingerprint`.
        about: where the prior comes from: model, recipe, tokens, seed, stability, versions.
        spread: for each statistic, the standard deviation (m,) float32 over sequences of each
            neuron's score: how sure the mean is.
        source: the file it was read from, for reports.
    """

    scores: dict[str, dict[str, np.ndarray]]
    fingerprint: dict[str, np.ndarray]
    about: dict[str, Any]
    spread: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    source: str = ""

    @property
    def whole(self) -> tuple[str, ...]:
        """The FFNs that are better kept whole, at the others' expense; see `curve`."""
        return tuple(self.about.get("whole", ()))

    @staticmethod
    def resembles(file: Path, weights: Mapping[str, np.ndarray]) -> bool:
        """Whether a file may be the prior of a model, by its fingerprint alone, which is small.

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            with safe_open(file, "numpy") as stored:
                keys = {f"{path}.{_SAMPLE}" for path in weights}
                if not keys <= {*stored.keys()}:
                    return False
                samples = {path: stored.get_tensor(f"{path}.{_SAMPLE}") for path in weights}
        except Exception as error:  # a damaged header shows up in many ways
            raise ValueError(f"the prior {file} cannot be read ({one_line(error)})") from error
        return _same_weights(weights, samples)

    def mismatch(self, widths: Mapping[str, int], weights: Mapping[str, np.ndarray]) -> str | None:
        """Say why the prior does not belong to a model, or None if it does.

        Weights are compared up to rounding, so that one prior serves a model in every precision
        and quantization.

        Args:
            widths: the number of neurons of each FFN of the model, by path.
            weights: the model's own `models.fingerprint`.
        """
        scores = next(iter(self.scores.values()))
        if scores.keys() != widths.keys():
            return f"its {len(scores)} FFNs are not the model's {len(widths)}"
        for path, width in widths.items():
            if len(scores[path]) != width:
                return f"{path} has {width} neurons in the model and {len(scores[path])} in it"
        if any(weights[path].shape != self.fingerprint[path].shape for path in widths):
            return "it was measured on a model of another hidden size"
        if not _same_weights(weights, self.fingerprint):
            return "it was measured on a model with other weights"
        return None

    def save(self, file: Path) -> None:
        """Write the prior to a file, by way of a temporary one beside it."""
        tensors = {
            f"{path}.{name}{suffix}": values
            for suffix, groups in (("", self.scores), (_SPREAD, self.spread))
            for name, scores in groups.items()
            for path, values in scores.items()
        }
        tensors |= {f"{path}.{_SAMPLE}": sample for path, sample in self.fingerprint.items()}
        write_tensors(file, tensors, FORMAT, self.about)

    @staticmethod
    def load(file: Path) -> "GlobalPrior":
        """Read and check a prior.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a prior, damaged, or has values that are not finite.
        """
        if not file.is_file():
            raise FileNotFoundError(f"there is no prior at {file}")
        try:
            tensors, about = read_tensors(file, FORMAT)
        except ValueError as error:
            raise ValueError(f"the prior {error}; build it again") from error
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, values in tensors.items():
            path, _, name = key.rpartition(".")
            groups.setdefault(name, {})[path] = values
        samples = groups.pop(_SAMPLE, {})
        if reason := _malformed(groups, samples, about):
            raise ValueError(f"the prior {file} is not a whole one: {reason}; build it again")
        scores = {name: group for name, group in groups.items() if not name.endswith(_SPREAD)}
        spread = {
            name.removesuffix(_SPREAD): group
            for name, group in groups.items()
            if name.endswith(_SPREAD)
        }
        return GlobalPrior(scores, samples, about, spread, str(file))


def _malformed(
    groups: Mapping[str, Mapping[str, np.ndarray]], samples: Mapping[str, np.ndarray], about: Any
) -> str | None:
    """Say what the contents of a prior's file lack, or None if they are complete."""
    if not isinstance(about, dict) or not _understood(about):
        return "it does not say in order where it comes from"
    if not samples or not any(not name.endswith(_SPREAD) for name in groups):
        return "it has no scores"
    if not {*about.get("whole", ())} <= samples.keys():
        return "it names FFNs to keep whole that it does not have"
    widths = {path: len(v) for path, v in next(iter(groups.values())).items() if v.ndim}
    for name, group in groups.items():
        if group.keys() != samples.keys():
            return f"{name} and the fingerprint are of different FFNs"
        for path, values in group.items():
            if values.dtype != np.float32 or values.shape != (widths.get(path),):
                return f"{path}.{name} is {values.dtype} of shape {values.shape}"
    for path, sample in samples.items():
        if sample.dtype != np.float32 or sample.ndim != 2:
            return f"{path}.{_SAMPLE} is {sample.dtype} of shape {sample.shape}"
    return None


def _understood(about: dict[str, Any]) -> bool:
    """Whether what a prior says of itself has the types that `describe` goes through."""
    stability, curve = about.get("stability", {}), about.get("curve")
    return (
        (curve is None or _is_curve(curve))
        and all(
            isinstance(about.get(key, {}), dict) for key in ("settings", "versions", "stability")
        )
        and all(isinstance(about.get(key, []), list) for key in ("recipes", "whole"))
        and all(isinstance(path, str) for path in about.get("whole", []))
        and all(isinstance(recipe, dict) for recipe in about.get("recipes", []))
        and all(
            isinstance(measures, dict)
            and all(
                isinstance(measure, dict)
                and all(isinstance(value, int | float) for value in measure.values())
                for measure in measures.values()
            )
            for measures in stability.values()
        )
    )


def _is_curve(curve: Any) -> bool:
    """Whether this is KL by increasing density, as `curve.measure_curve` makes it."""
    if not isinstance(curve, dict):
        return False
    densities, kl = curve.get("densities"), curve.get("kl")
    return (
        all(isinstance(values, list) for values in (densities, kl))
        and len(densities) == len(kl) > 0
        and all(isinstance(value, int | float) for value in (*densities, *kl))
        and all(a < b for a, b in pairwise([0, *densities, 1]))
        and isinstance(curve.get("tokens"), int)
    )


def cached_priors() -> Path:
    """The folder of the user's own priors."""
    return cache_folder() / "priors"


def cache_name(model: str, fingerprint: Mapping[str, np.ndarray]) -> str:
    """A name for a model's prior in the cache: the model's, and a hash that is its own."""
    digest = hashlib.sha256(b"".join(sample.tobytes() for sample in fingerprint.values()))
    return f"{model.rstrip('/').split('/')[-1]}-{digest.hexdigest()[:12]}"


def packaged_priors() -> Path:
    """The folder of the priors that come with this package."""
    return Path(str(resources.files("glass_mlx") / "priors"))


def stored_in(folder: Path) -> Iterator[Path]:
    """The priors in a folder, in the order of their names."""
    yield from sorted(folder.glob("*.safetensors"))
