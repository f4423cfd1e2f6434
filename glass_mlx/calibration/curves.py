"""Measure what slicing a model costs, and choose the FFNs that are better kept dense.

Both are measured on the model's own answers to a few prompts, with the slices and renewals of a
generation (see `prior.curves`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glass_mlx.calibration.texts import TEMPLATE_OPTIONS
from glass_mlx.chat_templates import Messages, encode
from glass_mlx.config import GlassConfig
from glass_mlx.fidelity.prompts import Continuation, read_prompts
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.files import write_text
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.session import Session
from glass_mlx.writing import Writer, stop_sequences

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Users' prompts are more like these than like questions that a model asks itself.
PROMPTS = Path(__file__).with_name("curve_prompts.txt")

# The densities that are measured. Those in between are interpolated.
DENSITIES = (0.5, 0.7, 0.85, 0.95)

# The FFNs to keep dense are chosen at this density, on at most this many texts. A smaller gain than
# this share of KL may be noise.
_TRIAL_DENSITY, _TRIAL_TEXTS, _MIN_GAIN = 0.7, 4, 0.02

# After this many texts, the curve is measured on no more once the standard errors of all its points
# are below this share of their KL.
_MIN_TEXTS, _CLEAR = 4, 0.08

# Users sample at about this temperature. The texts of a prior have a higher one.
_TEMPERATURE = 0.7

# A prior's texts have a seed of two numbers, so a seed of three gives different texts.
_SEED = (0, 0)


@dataclass(frozen=True)
class CurveSettings:
    """The texts that a curve is measured on. Each is read once, with all densities.

    Attributes:
        texts: the number of prompts; there are 16.
        length: the maximum number of tokens per answer.
        seed: the seed of the texts.
    """

    texts: int = 16
    length: int = 256
    seed: int = 0

    @property
    def trial_readings(self) -> int:
        """How often texts are read at most to choose FFNs to keep dense."""
        return 4 * min(_TRIAL_TEXTS, self.texts)


class CurveMeasurement:
    """A measurement of a curve that continues after an interruption.

    The texts are the model's answers to prompts of many kinds. Those with less than a quarter of
    the length are left out, because most of their tokens are dense warm-up.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        settings: the texts.
        partial: a file for the texts and the results so far. If it exists, the measurement
            continues from it, unless it is of another measurement.
        identity: everything else that the results depend on, as text.
        progress: called with the number of new readings of a text; see `CurveSettings`.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TokenizerWrapper,
        settings: CurveSettings,
        partial: Path | None = None,
        identity: str = "",
        progress: Callable[[int], object] = lambda readings: None,
    ) -> None:
        self._session, self._tokenizer, self._settings = session, tokenizer, settings
        self._partial, self._progress = partial, progress
        self._identity = json.dumps([identity, asdict(settings)])
        self._results: dict[str, list[list[float]]] = {}
        restored = session.ranks.on_first(self._restore)
        self._results = session.ranks.share(self._results)
        self._texts = restored or self._write_texts()

    def choose_kept_dense(self, prior: GlobalPrior) -> list[str]:
        """Choose FFNs to keep dense at the others' expense: those that lower KL.

        In some models the first FFNs matter far more than the others; in other models, keeping FFNs
        dense gains nothing (docs/experiments.md has figures). The first, the second and the last
        are tried, in this order.
        """
        paths = [*self._session.whole_shapes]
        config = GlassConfig(density=_TRIAL_DENSITY, vocabulary=1.0)
        kept_dense: list[str] = []
        best: np.ndarray | None = None
        for extra in ([], paths[:1], paths[1:2], paths[-1:]):
            trial = [*dict.fromkeys([*kept_dense, *extra])]
            candidate = replace(prior, about=prior.about | {"whole": trial})
            kl = np.array(
                [
                    self._measure(f"whole {trial}", n, candidate, [config])[0]
                    for n in range(min(_TRIAL_TEXTS, len(self._texts)))
                ]
            )
            if best is None or kl.mean() < (1 - _MIN_GAIN) * best.mean():
                kept_dense, best = trial, kl
        return kept_dense

    def measure(self, prior: GlobalPrior | None, config: GlassConfig) -> dict[str, Any]:
        """Measure KL by density.

        Args:
            prior: the prior that selects, or None.
            config: the settings of a generation, except for the shares.

        Returns:
            A record for `about["curves"]` of a prior.
        """
        plain = replace(config, max_kl=None, vocabulary=1.0)
        configs = [replace(plain, density=share) for share in DENSITIES]
        by_density: list[list[float]] = []
        for n in range(len(self._texts)):
            by_density.append(self._measure("density", n, prior, configs))
            kl = np.array(by_density)
            error = np.max(_standard_error(kl) / np.maximum(kl.mean(0), 1e-9))
            if n + 1 >= _MIN_TEXTS and error < _CLEAR:
                break
        return {
            "density": _curve(DENSITIES, by_density),
            "conditions": self._session.conditions(config),
            "texts": len(by_density),
            "tokens": sum(len(text.written) - 1 for text in self._texts[: len(by_density)]),
            "temperature": _TEMPERATURE,
        }

    def _measure(
        self, kind: str, number: int, prior: GlobalPrior | None, configs: Sequence[GlassConfig]
    ) -> list[float]:
        """Return the mean KL per token of one text for each configuration, measured or restored."""
        results = self._results.setdefault(kind, [])
        if number == len(results):
            text = self._texts[number]
            reading = DenseReading(self._session, text, [configs[0].warmup])
            kl = []
            for config in configs:
                selector = self._session.selector(config, prior)
                kl.append(float(score(reading, selector, masks=True).kl.mean()))
            if not np.isfinite(kl).all():
                raise ValueError("the model computes probabilities that are not a number")
            results.append([round(value, 6) for value in kl])
            self._save()
            self._progress(1)
            mx.clear_cache()
        return results[number]

    def _write_texts(self) -> list[Continuation]:
        """Have the model answer the prompts.

        Raises:
            ValueError: if no answer is long enough.
        """
        settings = self._settings
        answers = answer_prompts(self._session.model, self._tokenizer, settings)
        shortest = max(settings.length // 4, 2 * GlassConfig.warmup)
        texts = [text for text in answers if len(text.written) >= shortest]
        if not texts:
            raise ValueError("the model writes no text that is long enough to measure a curve on")
        self._texts = texts
        self._save()
        return texts

    def _save(self) -> None:
        if self._partial is not None and self._session.ranks.is_first:
            texts = [asdict(text) for text in self._texts]
            state = {"identity": self._identity, "texts": texts, "results": self._results}
            write_text(self._partial, json.dumps(state))

    def _restore(self) -> list[Continuation]:
        """Return the texts of an interrupted measurement, and keep its results."""
        if self._partial is None or not self._partial.is_file():
            return []
        try:
            state = json.loads(self._partial.read_text())
            if state["identity"] != self._identity:
                return []
            self._results = state["results"]
            return [Continuation(**text) for text in state["texts"]]
        except (KeyError, TypeError, ValueError):  # damaged: measured again
            return []


def answer_prompts(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: CurveSettings,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Continuation]:
    """Have a model answer prompts of many kinds, as users sample.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        settings: the number of prompts, the length of the answers, and the seed.
        progress: called with the number of tokens written at each step.
    """
    write = Writer(model, _TEMPERATURE, [settings.seed, *_SEED], progress)
    messages = read_prompts(PROMPTS)[: settings.texts]
    encoded = [_encode(tokenizer, [message]) for (message,) in messages]
    prompts = [prompt for prompt in encoded if prompt]  # some tokenizers know no such letters
    lengths = [settings.length] * len(prompts)
    answers = write(prompts, lengths, stop_sequences(tokenizer), 0) if prompts else []
    return [Continuation(*pair) for pair in zip(prompts, answers, strict=True)]


def _standard_error(values: np.ndarray) -> Any:
    """Return the standard error of the mean over the first axis; infinite for a single value."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.inf)
    return values.std(0, ddof=1) / len(values) ** 0.5


def _curve(shares: Sequence[float], kl: list[list[float]]) -> dict[str, list[float]]:
    """Return the record of a curve, with the standard errors of KL over texts.

    Args:
        shares: the n shares.
        kl: the n KLs of each text.
    """
    values = np.array(kl)
    record = {"shares": [*shares], "kl": [round(float(mean), 6) for mean in values.mean(0)]}
    if len(values) > 1:
        record["standard_error"] = [round(float(e), 6) for e in _standard_error(values)]
    return record


def _encode(tokenizer: TokenizerWrapper, messages: Messages) -> list[int]:
    """Encode a prompt with the chat template; without it, if there is none or it fails."""
    try:
        return encode(tokenizer, messages, **TEMPLATE_OPTIONS)
    except ValueError:
        return encode(tokenizer, messages, True)
