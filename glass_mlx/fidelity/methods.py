"""The methods to compare, and their scores on a text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from glass_mlx.calibration.first_use import make_selector
from glass_mlx.config import GlassConfig, Setting
from glass_mlx.fidelity.report import Outcome
from glass_mlx.fidelity.rivals import Rival
from glass_mlx.fidelity.scoring import DenseReading, Scores, score
from glass_mlx.fidelity.tasks import Sample
from glass_mlx.fidelity.thresholds import Thresholds
from glass_mlx.models import FFN
from glass_mlx.models.linear import dense_weight
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.selection import Selection, select
from glass_mlx.session import Session

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

Options = dict[str, Any]

# The method without slicing.
DENSE = "dense"

# Thresholds on the inputs of all linear layers, of which a density is the share that passes.
TEAL = "teal"

# The method that bounds on KL are for. Other methods are compared at the same shares.
BOUNDED = "default"

# Static methods select once, after the prompt. The paper's methods are static, rank by mean
# activations, and keep the same share in every FFN.
_STATIC: Options = {"warmup": 1, "refresh": 0, "dense_every": 0}
_MEANS: Options = {"statistic": "activation", "prior_statistic": "activation"}
_PAPER: Options = _STATIC | _MEANS | {"prior_weight": 0.5, "uniform": True}

# Options of `GlassConfig` by method.
METHODS: dict[str, Options] = {
    DENSE: {},
    "random": _PAPER,
    "magnitude": _PAPER,
    "prompt-only": _PAPER | {"prior_weight": 0.0},
    "prompt-only-griffin": _PAPER | {"prior_weight": 0.0, "statistic": "griffin"},
    "prior-only": _PAPER | {"prior_weight": 1.0},
    "glass": _PAPER,
    "glass-impact": _PAPER | {"prior_statistic": "impact"},
    "glass-griffin": _PAPER | {"prior_statistic": "griffin"},
    "static": _STATIC,
    "warmup": {"refresh": 0, "dense_every": 0},
    "refresh": {"warmup": 1},
    "uniform": {"uniform": True},
    "default": {},
    # The neurons of a checkpoint from `glass-mlx export` without prompts, the same for all texts.
    "export": _STATIC | {"prior_weight": 1.0, "uniform": True},
    TEAL: {},
    "oracle": _PAPER,
    "oracle-griffin": _PAPER | {"statistic": "griffin"},
}

# Methods that do not fuse two rankings, so that the prior weight does not matter.
UNFUSED_METHODS = (DENSE, "random", "magnitude", "export", TEAL, "oracle", "oracle-griffin")


def choose_methods(
    names: Iterable[str], prior_weights: Sequence[float], weighted_names: Iterable[str]
) -> dict[str, Options]:
    """Return the options of some methods, by the name of each row.

    Args:
        names: keys of `METHODS`.
        prior_weights: values of λ.
        weighted_names: methods to add once for every λ.
    """
    methods = {name: METHODS[name] for name in names}
    for name in weighted_names:
        for weight in prior_weights:
            methods[f"{name} λ {weight:g}"] = METHODS[name] | {"prior_weight": weight}
    return methods


class Evaluation:
    """Scores methods on texts.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        prior: its prior.
        methods: options of `GlassConfig`, by the name of the method.
        settings: the settings to score every method at.
        seed: the seed of random selections.
        rivals: other models to score, too.
        thresholds: the thresholds of the method teal.

    Attributes:
        session: the dense model's session.
        prior: its prior.
        settings: the settings to score every method at.
        configs: the configuration of each method, without a setting.
        rivals: the identities of the rivals.

    Raises:
        ValueError: if a configuration is not valid, or the prior lacks one of its statistics.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TokenizerWrapper,
        prior: GlobalPrior,
        methods: Mapping[str, Options],
        settings: Sequence[Setting],
        seed: int,
        rivals: Sequence[Rival] = (),
        thresholds: Thresholds | None = None,
    ) -> None:
        self.session, self.prior, self.settings, self._seed = session, prior, settings, seed
        self.configs = {name: GlassConfig(**options) for name, options in methods.items()}
        self._pairs = [
            (name, setting)
            for setting in settings
            for name in self.configs
            if _suits(name, setting)
        ]
        self._selectors = {
            (name, setting): make_selector(
                session, tokenizer, prior, replace(self.configs[name], **setting._asdict())
            )
            for name, setting in self._pairs
            if name not in (DENSE, TEAL)
        }
        self._magnitudes = weight_magnitudes(session.ffns) if "magnitude" in methods else {}
        self._rivals, self._thresholds = rivals, thresholds
        self.rivals = [rival.identity for rival in rivals]

    def score(self, sample: Sample, number: int) -> dict[tuple[str, Setting], Outcome]:
        """Score every method at every setting on one text.

        Args:
            sample: the text.
            number: its number, which the random selection depends on.
        """
        warmups = {selector.config.warmup for selector in self._selectors.values()}
        points = [n for n in sorted(warmups) if n < len(sample.text.written)]
        reading = DenseReading(self.session, sample.text, points)
        outcomes = {
            (name, setting): self._score_method(name, setting, reading, sample, number)
            for name, setting in self._pairs
        }
        for rival in self._rivals:
            for name, setting, scores in rival.score(reading, sample.text):
                outcomes[name, setting] = Outcome.of(scores, None, sample.answers)
        return outcomes

    def _score_method(
        self, name: str, setting: Setting, reading: DenseReading, sample: Sample, number: int
    ) -> Outcome:
        if name == DENSE:
            return Outcome.of(Scores.exact(reading), None, sample.answers)
        if name == TEAL:
            assert self._thresholds is not None
            density = setting.density or 1.0
            scores = self._thresholds.score(reading, density)
            return replace(Outcome.of(scores, None, sample.answers), density=density)
        selector = self._selectors[name, setting]
        density = selector.config.shares.density
        ranking = self._fixed_ranking(name, selector.config.statistic, reading, number)
        if ranking is None:
            scores = score(reading, selector)
        else:
            selection = self._select(ranking, density)
            scores = score(reading, selector, lambda local: selection)
        oracle = self._select(reading.oracle.scores("activation"), density)
        return Outcome.of(scores, oracle, sample.answers)

    def _fixed_ranking(
        self, name: str, statistic: str, reading: DenseReading, number: int
    ) -> Mapping[str, np.ndarray] | None:
        """Return the neurons' scores for methods that ignore local statistics and the prior."""
        if name == "random":
            rng = np.random.default_rng([self._seed, number])
            return {path: rng.random(shape) for path, shape in self.session.shapes.items()}
        if name == "magnitude":
            return self._magnitudes
        if name.startswith("oracle"):
            return reading.oracle.scores(statistic)
        return None

    def _select(self, scores: Mapping[str, np.ndarray], density: float) -> Selection:
        return select(scores, density, self.session.multiples)


def _suits(name: str, setting: Setting) -> bool:
    """Return whether a method can be scored at a setting."""
    if setting.max_kl is not None:
        return name in (DENSE, BOUNDED)
    return name != TEAL or setting.vocabulary in (None, 1)


def weight_magnitudes(ffns: Iterable[FFN]) -> dict[str, np.ndarray]:
    """Return the product of the norms of each neuron's weights, (..., m) float32 by FFN path."""
    scores = {}
    for ffn in ffns:
        parts = []
        for member in ffn.members:
            expand = [dense_weight(layer) for layer in member.expand.values()]
            norms = [mx.linalg.norm(weight, axis=-1) for weight in expand]
            norms.append(mx.linalg.norm(dense_weight(member.contract[1]), axis=-2))
            parts.append(np.array(mx.stack(norms).astype(mx.float32).prod(axis=0)))
        scores[ffn.path] = np.stack(parts).reshape(ffn.shape)
    return scores
