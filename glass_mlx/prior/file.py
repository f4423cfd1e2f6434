"""The global prior of a model: neuron scores, measured once and stored in one file.

The file is safetensors. For each FFN it holds:

- `<path>.<statistic>`: the raw scores, (m,) float32, or (experts, m) for a stack of experts;
- `<path>.<statistic>_spread`: their standard deviation over sequences, in the same shape;
- `<path>.fingerprint`: a small sample of the model's weights, (8, 32) float32;
- `<path>.routed`, for a stack: the number of tokens routed to each expert, (experts,) float32.

`vocabulary.plausibility` holds the mean flattened prediction of each token (see
`vocabulary.VocabularyStatistics`), (V,) float32.

The metadata (see `files.write_tensors`) describes the measurement: model, recipes, settings,
stability and versions. It has no date, so that two identical measurements give identical files.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from glass_mlx.errors import one_line
from glass_mlx.files import cache_folder, read_about, read_tensors, write_tensors
from glass_mlx.models import Fingerprint
from glass_mlx.prior.curves import Curve
from glass_mlx.ranking import ranks
from glass_mlx.statistics import Shape

import numpy as np
from safetensors import safe_open

FORMAT = "glass-prior-4"
FILE_NAME = "glass_prior.safetensors"

_FINGERPRINT = "fingerprint"
_VOCABULARY = "vocabulary.plausibility"
_ROUTED = "routed"
_SPREAD = "_spread"

# Keys in `about`: the FFNs to keep dense, the curves, the rounding error of the fingerprint,
# for a prior of a related model the similarity of the two models, and whether it has other tokens.
_KEPT_DENSE = "whole"
_CURVES = "curves"
_ROUNDING = "rounding"
_SIMILARITY = "similarity"
_OTHER_TOKENS = "other_tokens"

# A model's variants have a few more tokens at the end, or fewer. If their number differs by more
# than this share, they are other tokens.
_MAX_TOKENS_ADDED = 1 / 16


@dataclass(frozen=True)
class GlobalPrior:
    """The general importance of each neuron of a model.

    Attributes:
        scores: (m,) float32 scores, by statistic and FFN path; (experts, m) for a stack.
        fingerprint: a sample of the model's weights.
        about: the description of the measurement: model, recipes, settings, stability, versions.
        spread: the standard deviation over sequences of each neuron's score, (m,) float32, by
            statistic and FFN path. It shows how certain the score is.
        vocabulary: the mean flattened prediction of each token, (V,) float32, or None; see
            `vocabulary.VocabularyStatistics`.
        routed: the number of tokens that were routed to each expert, (experts,) float32, by stack.
        source: the file that the prior was loaded from, for reports.
    """

    scores: dict[str, dict[str, np.ndarray]]
    fingerprint: Fingerprint
    about: dict[str, Any]
    spread: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    vocabulary: np.ndarray | None = None
    routed: dict[str, np.ndarray] = field(default_factory=dict)
    source: str = ""
    _ranks: dict[str, dict[str, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def kept_dense(self) -> tuple[str, ...]:
        """The FFNs to keep dense, at the expense of the others; see `calibration.curves`."""
        return tuple(self.about.get(_KEPT_DENSE, ()))

    @property
    def title(self) -> str:
        """The prior's file for reports, and whether it was measured on another model."""
        title = self.source or "given"
        if (similarity := self.about.get(_SIMILARITY)) is not None:
            model = self.about.get("model") or "a related model"
            title += f" (measured on other weights: {model}, similarity {similarity:.3f})"
        if self.about.get(_OTHER_TOKENS):
            title += " (measured with other tokens, whose scores are not used)"
        return title

    @cached_property
    def digest(self) -> str:
        """A hash of everything that selections depend on."""
        state = hashlib.sha256(json.dumps(self.kept_dense).encode())
        for name, group in sorted(self.scores.items()):
            for path, values in group.items():
                state.update(f"{path}.{name}".encode() + values.tobytes())
        for path, counts in sorted(self.routed.items()):
            state.update(f"{path}.{_ROUTED}".encode() + counts.tobytes())
        if self.vocabulary is not None:
            state.update(self.vocabulary.tobytes())
        return state.hexdigest()

    def curve(self, conditions: Mapping[str, Any]) -> Curve | None:
        """Return the curve that was measured under some conditions, or None."""
        records = self.about.get(_CURVES, [])
        matches = (record for record in records if record["conditions"] == conditions)
        return next(map(Curve.parse, matches), None)

    def ranks(self, statistic: str) -> dict[str, np.ndarray]:
        """Rank the neurons of each FFN by one statistic.

        The ranks are computed in the first call and shared by later ones; do not modify them.

        Returns:
            (..., m) int64 ranks 1..m by FFN path; see `ranking.ranks`.
        """
        if statistic not in self._ranks:
            scores = self.scores[statistic]
            self._ranks[statistic] = {path: ranks(values) for path, values in scores.items()}
        return self._ranks[statistic]

    @staticmethod
    def read_fingerprint(file: Path) -> Fingerprint:
        """Read only the small fingerprint of a file.

        Raises:
            ValueError: if the file cannot be read.
        """
        suffix = f".{_FINGERPRINT}"
        try:
            with safe_open(file, "numpy") as stored:
                keys = [key for key in stored.keys() if key.endswith(suffix)]  # noqa: SIM118
                samples = {key.removesuffix(suffix): stored.get_tensor(key) for key in keys}
            return Fingerprint(samples, read_about(file, FORMAT)[_ROUNDING])
        except Exception as error:  # damaged headers cause many kinds of errors
            raise ValueError(f"the prior {file} cannot be read ({one_line(error)})") from error

    def part(
        self, parts: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> "GlobalPrior":
        """Return the prior of the neurons of one process.

        Args:
            parts: takes what belongs to these neurons out of arrays by path, whose last axis is
                neurons; see `Division.parts`.
        """
        scores = {name: parts(group) for name, group in self.scores.items()}
        paths = next(iter(scores.values())).keys()
        routed = {path: counts for path, counts in self.routed.items() if path in paths}
        return replace(self, scores=scores, spread={}, routed=routed)

    def with_vocabulary(self, size: int) -> "GlobalPrior":
        """Return the prior for a model with another number of tokens.

        Variants of a model add tokens at the end, or fill its vocabulary up to a round number; a
        token without a score gets 0. If far more or fewer tokens are known, they are other tokens,
        and no scores are left. The `title` says so.

        Args:
            size: the number of tokens that the model's head knows.
        """
        scores = self.vocabulary
        if scores is None or len(scores) == size:
            return self
        if abs(size - len(scores)) > _MAX_TOKENS_ADDED * size:
            return replace(self, vocabulary=None, about=self.about | {_OTHER_TOKENS: True})
        return replace(self, vocabulary=np.pad(scores[:size], (0, max(0, size - len(scores)))))

    def fitted(self, shapes: Mapping[str, Shape], weights: Fingerprint) -> "GlobalPrior":
        """Check that the prior fits a model, and leave out what holds for no other model.

        Weights are compared up to rounding, so that one prior serves a model in every precision
        and quantization. The prior of a related model, such as a fine-tune, serves as well, but
        without its curves and its list of FFNs to keep dense. Its `title` says so.

        Args:
            shapes: the number of neurons m of each FFN of the model, or (experts, m), by path.
            weights: the model's fingerprint.

        Raises:
            ValueError: if the prior does not fit, with the reason.
        """
        if reason := self._mismatch(shapes, weights):
            raise ValueError(f"the prior {self.title} is not for this model: {reason}")
        if self.fingerprint.is_same_model(weights):
            return self
        about = {key: v for key, v in self.about.items() if key not in (_KEPT_DENSE, _CURVES)}
        similarity = round(self.fingerprint.similarity(weights), 6)
        return replace(self, about=about | {_SIMILARITY: similarity})

    def _mismatch(self, shapes: Mapping[str, Shape], weights: Fingerprint) -> str | None:
        """Return the reason why the prior does not fit a model, or None if it does."""
        scores = next(iter(self.scores.values()))
        if scores.keys() != shapes.keys():
            return f"its {len(scores)} FFNs are not the model's {len(shapes)}"
        for path, shape in shapes.items():
            axes = (shape,) if isinstance(shape, int) else shape
            if scores[path].shape != axes:
                own, models = (" x ".join(map(str, s)) for s in (scores[path].shape, axes))
                return f"{path} has {models} neurons in the model and {own} in it"
        if not self.fingerprint.similarity(weights):
            return "it was measured on a model with other weights, or other order of neurons"
        return None

    def save(self, file: Path) -> None:
        """Write the prior to a temporary file, and rename that to `file`."""
        tensors = {
            f"{path}.{name}{suffix}": values
            for suffix, groups in (("", self.scores), (_SPREAD, self.spread))
            for name, scores in groups.items()
            for path, values in scores.items()
        }
        if self.vocabulary is not None:
            tensors[_VOCABULARY] = self.vocabulary
        tensors |= {f"{path}.{_ROUTED}": counts for path, counts in self.routed.items()}
        samples = self.fingerprint.samples
        tensors |= {f"{path}.{_FINGERPRINT}": sample for path, sample in samples.items()}
        write_tensors(file, tensors, FORMAT, self.about | {_ROUNDING: self.fingerprint.rounding})

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
        vocabulary = tensors.pop(_VOCABULARY, None)
        groups: dict[str, dict[str, np.ndarray]] = {}
        for key, values in tensors.items():
            path, _, name = key.rpartition(".")
            groups.setdefault(name, {})[path] = values
        samples, routed = groups.pop(_FINGERPRINT, {}), groups.pop(_ROUTED, {})
        defect = _find_defect(groups, samples, vocabulary, about)
        if defect := defect or _find_routing_defect(groups, routed):
            raise ValueError(f"the prior {file} is malformed: {defect}; build it again")
        scores = {name: group for name, group in groups.items() if not name.endswith(_SPREAD)}
        spread = {
            name.removesuffix(_SPREAD): group
            for name, group in groups.items()
            if name.endswith(_SPREAD)
        }
        weights = Fingerprint(samples, about.pop(_ROUNDING))
        return GlobalPrior(scores, weights, about, spread, vocabulary, routed, str(file))


def _find_defect(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    samples: Mapping[str, np.ndarray],
    vocabulary: np.ndarray | None,
    about: Any,
) -> str | None:
    """Return the first defect in the contents of a prior's file, or None.

    Args:
        groups: scores and spreads, by name and FFN path.
        samples: the fingerprint.
        vocabulary: the scores of the vocabulary, or None.
        about: the description of the measurement.
    """
    if not isinstance(about, dict) or not _is_description(about):
        return "its description is malformed"
    if not samples or not any(not name.endswith(_SPREAD) for name in groups):
        return "it has no scores"
    if vocabulary is not None and (
        vocabulary.dtype != np.float32 or vocabulary.ndim != 1 or not vocabulary.size
    ):
        return f"{_VOCABULARY} has type {vocabulary.dtype} and shape {vocabulary.shape}"
    if not {*about.get(_KEPT_DENSE, ())} <= samples.keys():
        return "its list of FFNs to keep dense names FFNs without scores"
    shapes = {path: v.shape for path, v in next(iter(groups.values())).items() if 0 < v.ndim < 3}
    for name, group in groups.items():
        if group.keys() != samples.keys():
            return f"{name} and the fingerprint cover different FFNs"
        for path, values in group.items():
            if values.dtype != np.float32 or values.shape != shapes.get(path):
                return f"{path}.{name} has type {values.dtype} and shape {values.shape}"
    for path, sample in samples.items():
        if sample.dtype != np.float32 or sample.ndim != 2:
            return f"{path}.{_FINGERPRINT} has type {sample.dtype} and shape {sample.shape}"
    return None


def _find_routing_defect(
    groups: Mapping[str, Mapping[str, np.ndarray]], routed: Mapping[str, np.ndarray]
) -> str | None:
    """Return the first defect in the tokens of experts, or None; see `_find_defect`."""
    scores = next(iter(groups.values()))
    stacks = {path: values.shape[:1] for path, values in scores.items() if values.ndim == 2}
    if routed.keys() != stacks.keys():
        return f"{_ROUTED} and the scores cover different stacks of experts"
    for path, counts in routed.items():
        if counts.dtype != np.float32 or counts.shape != stacks[path] or counts.min() < 0:
            return f"{path}.{_ROUTED} has type {counts.dtype} and shape {counts.shape}"
    return None


def _is_description(about: dict[str, Any]) -> bool:
    """Return whether the parts of a description that other modules use have the right types."""
    stability, rounding = about.get("stability", {}), about.get(_ROUNDING)
    return (
        isinstance(rounding, float)
        and 0 <= rounding < 1
        and isinstance(about.get("model", ""), str)
        and isinstance(about.get(_SIMILARITY, 1.0), float)
        and all(
            isinstance(about.get(key, {}), dict) for key in ("settings", "versions", "stability")
        )
        and all(isinstance(about.get(key, []), list) for key in ("recipes", _CURVES, _KEPT_DENSE))
        and all(isinstance(path, str) for path in about.get(_KEPT_DENSE, []))
        and all(isinstance(recipe, dict) for recipe in about.get("recipes", []))
        and all(map(_is_curves, about.get(_CURVES, [])))
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


def _is_curves(record: Any) -> bool:
    """Return whether a value is a record of curves; see `Curve.parse`."""
    try:
        Curve.parse(record)
    except (AttributeError, ValueError):
        return False
    return True


def cached_priors() -> Path:
    """Return the folder of the priors in the user's cache."""
    return cache_folder() / "priors"


def packaged_priors() -> Path:
    """Return the folder of the priors that come with this package."""
    return Path(str(resources.files("glass_mlx") / "priors"))


def prior_files(folder: Path) -> Iterator[Path]:
    """Yield the priors in a folder, sorted by name."""
    yield from sorted(folder.glob("*.safetensors"))


def cache_name(model: str, fingerprint: Fingerprint) -> str:
    """Return the name of a model's prior in the cache: the model's name and a hash of its weights.

    Args:
        model: the model's name, hub id or path.
        fingerprint: the model's fingerprint.
    """
    samples = fingerprint.samples.values()
    digest = hashlib.sha256(b"".join(sample.tobytes() for sample in samples))
    return f"{model.rstrip('/').split('/')[-1]}-{digest.hexdigest()[:12]}"
