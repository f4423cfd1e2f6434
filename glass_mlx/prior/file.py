"""The global prior of a model: neuron scores, measured once and stored in one file.

The file is safetensors. For each FFN it holds:

- `<path>.<statistic>`: the raw scores, (m,) float32;
- `<path>.<statistic>_spread`: their standard deviation over sequences, (m,) float32;
- `<path>.fingerprint`: a small sample of the model's weights, float32.

The metadata (see `files.write_tensors`) describes the measurement: model, recipes, settings,
stability and versions. It has no date, so that two identical measurements give identical files.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from glass_mlx.errors import one_line
from glass_mlx.files import cache_folder, read_tensors, write_tensors
from glass_mlx.ranking import ranks

import numpy as np
from safetensors import safe_open

FORMAT = "glass-prior-2"
FILE_NAME = "glass_prior.safetensors"
BUILD_COMMAND = "python tools/build_priors.py --model {model} --output glass_prior.safetensors"

_FINGERPRINT = "fingerprint"
_SPREAD = "_spread"

# The key in `about` of the FFNs to keep dense.
_KEPT_DENSE = "whole"

# Two fingerprints with a larger cosine belong to the same model. For one model (SmolLM2-135M,
# requantized in groups of 64) the cosine is 0.996 at 4 bits and 0.925 at 2 bits. Fingerprints of
# models that were trained separately have nothing in common.
_MIN_COSINE = 0.8


@dataclass(frozen=True)
class GlobalPrior:
    """The general importance of each neuron of a model.

    Attributes:
        scores: (m,) float32 scores, by statistic and FFN path.
        fingerprint: a sample of the weights of each FFN; see `models.fingerprint`.
        about: the description of the measurement: model, recipes, settings, stability, versions.
        spread: the standard deviation over sequences of each neuron's score, (m,) float32, by
            statistic and FFN path. It shows how certain the score is.
        source: the file that the prior was loaded from, for reports.
    """

    scores: dict[str, dict[str, np.ndarray]]
    fingerprint: dict[str, np.ndarray]
    about: dict[str, Any]
    spread: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    source: str = ""
    _ranks: dict[str, dict[str, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def kept_dense(self) -> tuple[str, ...]:
        """The FFNs to keep dense, at the expense of the others; see `calibration.curve`."""
        return tuple(self.about.get(_KEPT_DENSE, ()))

    def ranks(self, statistic: str) -> dict[str, np.ndarray]:
        """Rank the neurons of each FFN by one statistic.

        The ranks are computed in the first call and shared by later ones; do not modify them.

        Returns:
            (m,) int64 ranks 1..m by FFN path; see `ranking.ranks`.
        """
        if statistic not in self._ranks:
            scores = self.scores[statistic]
            self._ranks[statistic] = {path: ranks(values) for path, values in scores.items()}
        return self._ranks[statistic]

    @staticmethod
    def matches_weights(file: Path, weights: Mapping[str, np.ndarray]) -> bool:
        """Return whether a file may hold a model's prior, reading only its small fingerprint.

        Args:
            file: the file.
            weights: the model's `models.fingerprint`.

        Raises:
            ValueError: if the file cannot be read.
        """
        try:
            with safe_open(file, "numpy") as stored:
                keys = {f"{path}.{_FINGERPRINT}" for path in weights}
                if not keys <= {*stored.keys()}:
                    return False
                samples = {path: stored.get_tensor(f"{path}.{_FINGERPRINT}") for path in weights}
        except Exception as error:  # damaged headers cause many kinds of errors
            raise ValueError(f"the prior {file} cannot be read ({one_line(error)})") from error
        return _same_weights(weights, samples)

    def mismatch(self, widths: Mapping[str, int], weights: Mapping[str, np.ndarray]) -> str | None:
        """Return the reason why the prior does not belong to a model, or None if it does.

        Weights are compared up to rounding, so that one prior serves a model in every precision
        and quantization.

        Args:
            widths: the number of neurons of each FFN of the model, by path.
            weights: the model's `models.fingerprint`.
        """
        scores = next(iter(self.scores.values()))
        if scores.keys() != widths.keys():
            return f"its {len(scores)} FFNs are not the model's {len(widths)}"
        for path, width in widths.items():
            if len(scores[path]) != width:
                return f"{path} has {width} neurons in the model and {len(scores[path])} in it"
        if any(weights[path].shape != self.fingerprint[path].shape for path in widths):
            return "it was measured on a model with a different hidden size"
        if not _same_weights(weights, self.fingerprint):
            return "it was measured on a model with other weights"
        return None

    def save(self, file: Path) -> None:
        """Write the prior to a temporary file, and rename that to `file`."""
        tensors = {
            f"{path}.{name}{suffix}": values
            for suffix, groups in (("", self.scores), (_SPREAD, self.spread))
            for name, scores in groups.items()
            for path, values in scores.items()
        }
        tensors |= {f"{path}.{_FINGERPRINT}": sample for path, sample in self.fingerprint.items()}
        write_tensors(file, tensors, FORMAT, self.about)

    @staticmethod
    def load(file: Path) -> "GlobalPrior":
        """Read and check a prior.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is damaged, is not a prior, or has values that are not finite.
        """
        if not file.is_file():
            raise FileNotFoundError(f"there is no prior at {file}")
        try:
            tensors, about, _ = read_tensors(file, FORMAT)
        except ValueError as error:
            raise ValueError(f"the prior {error}; build it again") from error
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, values in tensors.items():
            path, _, name = key.rpartition(".")
            groups.setdefault(name, {})[path] = values
        samples = groups.pop(_FINGERPRINT, {})
        if defect := _find_defect(groups, samples, about):
            raise ValueError(f"the prior {file} is malformed: {defect}; build it again")
        scores = {name: group for name, group in groups.items() if not name.endswith(_SPREAD)}
        spread = {
            name.removesuffix(_SPREAD): group
            for name, group in groups.items()
            if name.endswith(_SPREAD)
        }
        return GlobalPrior(scores, samples, about, spread, str(file))


def _same_weights(model: Mapping[str, np.ndarray], prior: Mapping[str, np.ndarray]) -> bool:
    """Return whether two fingerprints belong to one model, in any precision."""
    if any(model[path].shape != prior[path].shape for path in model):
        return False
    a, b = (
        np.concatenate([samples[path].ravel() for path in model]).astype(np.float64)
        for samples in (model, prior)
    )
    return bool(a @ b > _MIN_COSINE * np.linalg.norm(a) * np.linalg.norm(b))


def _find_defect(
    groups: Mapping[str, Mapping[str, np.ndarray]], samples: Mapping[str, np.ndarray], about: Any
) -> str | None:
    """Return the first defect in the contents of a prior's file, or None.

    Args:
        groups: scores and spreads, by name and FFN path.
        samples: the fingerprint.
        about: the description of the measurement.
    """
    if not isinstance(about, dict) or not _is_description(about):
        return "its description is malformed"
    if not samples or not any(not name.endswith(_SPREAD) for name in groups):
        return "it has no scores"
    if not {*about.get(_KEPT_DENSE, ())} <= samples.keys():
        return "its list of FFNs to keep dense names FFNs without scores"
    widths = {path: len(v) for path, v in next(iter(groups.values())).items() if v.ndim}
    for name, group in groups.items():
        if group.keys() != samples.keys():
            return f"{name} and the fingerprint cover different FFNs"
        for path, values in group.items():
            if values.dtype != np.float32 or values.shape != (widths.get(path),):
                return f"{path}.{name} has type {values.dtype} and shape {values.shape}"
    for path, sample in samples.items():
        if sample.dtype != np.float32 or sample.ndim != 2:
            return f"{path}.{_FINGERPRINT} has type {sample.dtype} and shape {sample.shape}"
    return None


def _is_description(about: dict[str, Any]) -> bool:
    """Return whether the parts of a description that other modules use have the right types."""
    stability, curve = about.get("stability", {}), about.get("curve")
    return (
        (curve is None or _is_curve(curve))
        and all(
            isinstance(about.get(key, {}), dict) for key in ("settings", "versions", "stability")
        )
        and all(isinstance(about.get(key, []), list) for key in ("recipes", _KEPT_DENSE))
        and all(isinstance(path, str) for path in about.get(_KEPT_DENSE, []))
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
    """Return whether a value is a density curve, as `calibration.curve` measures it."""
    if not isinstance(curve, dict):
        return False
    densities, kl = curve.get("densities"), curve.get("kl")
    if not isinstance(densities, list) or not isinstance(kl, list):
        return False
    return (
        len(densities) == len(kl) > 0
        and all(isinstance(value, int | float) for value in (*densities, *kl))
        and all(a < b for a, b in pairwise([0, *densities, 1]))
        and isinstance(curve.get("tokens"), int)
    )


def cached_priors() -> Path:
    """Return the folder of the priors in the user's cache."""
    return cache_folder() / "priors"


def packaged_priors() -> Path:
    """Return the folder of the priors that come with this package."""
    return Path(str(resources.files("glass_mlx") / "priors"))


def prior_files(folder: Path) -> Iterator[Path]:
    """Yield the priors in a folder, sorted by name."""
    yield from sorted(folder.glob("*.safetensors"))


def cache_name(model: str, fingerprint: Mapping[str, np.ndarray]) -> str:
    """Return the name of a model's prior in the cache: the model's name and a hash of its weights.

    Args:
        model: the model's name, hub id or path.
        fingerprint: the model's `models.fingerprint`.
    """
    digest = hashlib.sha256(b"".join(sample.tobytes() for sample in fingerprint.values()))
    return f"{model.rstrip('/').split('/')[-1]}-{digest.hexdigest()[:12]}"
