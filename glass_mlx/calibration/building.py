"""Measure a model's global prior on text that the model writes itself, or on a corpus.

Sequences are written batch by batch (`calibration.texts`), and then read densely to measure the
neurons of the FFNs. Each sequence gives one score for each neuron and statistic; the prior holds
their mean and spread. The memory used beyond the model's does not grow with the number of tokens.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glass_mlx.calibration.curves import CurveMeasurement, CurveSettings
from glass_mlx.calibration.mixture import MeasuredRecipe, Mixture
from glass_mlx.calibration.moments import SequenceMoments
from glass_mlx.calibration.resume import restore_checkpoint, save_checkpoint
from glass_mlx.calibration.sequence_scores import measure_sequences
from glass_mlx.calibration.stability import Stability, overall_stability
from glass_mlx.calibration.texts import (
    SKIPPED_POSITIONS,
    BatchSource,
    Recipe,
    chat_frame,
    make_source,
)
from glass_mlx.config import GlassConfig, check_seed
from glass_mlx.files import check_writable, is_device, locked
from glass_mlx.models import Fingerprint, named_arrays
from glass_mlx.prior.display import MIN_EXPERT_TOKENS, stability_lines
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.reporting.machine import made_with
from glass_mlx.session import Session
from glass_mlx.statistics import IMPACT, PRIOR_STATISTICS
from glass_mlx.writing import Writer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm


@dataclass(frozen=True)
class CalibrationSettings:
    """How a prior is measured.

    Attributes:
        recipes: the texts to measure on. Their weights are also their shares of the tokens.
            Default: see `default_recipes`.
        statistics: the statistics to measure, a subset of `statistics.PRIOR_STATISTICS`.
        tokens: the minimum number of tokens to measure.
        sequences: the minimum number of sequences to measure, instead of tokens.
        length: tokens per sequence.
        batch_size: sequences written at once.
        temperature: the sampling temperature.
        seed: the same seed gives the same prior, whether or not the run is interrupted.
        until_stable: stop before `tokens` once `calibration.stability.overall_stability` of the two
            halves of the sequences reaches this value.
        expert_factor: in mixtures of experts, measure more than `tokens` or `sequences`, up to this
            many times as much, while this gives experts enough tokens that have too few. The texts
            are those that reach such experts most often. 1 for no more.
        corpus_field: the field of a JSONL corpus that holds the text.
        curve_texts: the maximum number of texts for the model's curve (`calibration.curves`); 0 for
            none. A prior without the statistic that decoding ranks by has none.

    Raises:
        ValueError: for the first value that is out of range.
    """

    recipes: tuple[Recipe, ...] = ()
    statistics: tuple[str, ...] = ("activation", "griffin")
    tokens: int = 16384
    sequences: int | None = None
    length: int = 256
    batch_size: int = 32
    temperature: float = 1.0
    seed: int = 0
    until_stable: float | None = None
    expert_factor: float = 4.0
    corpus_field: str = "text"
    curve_texts: int = CurveSettings.texts

    def __post_init__(self) -> None:
        """Check every value."""
        sequences = 1 if self.sequences is None else self.sequences
        for value in (self.tokens, sequences, self.length, self.batch_size, self.temperature):
            if not 0 < value < float("inf"):
                raise ValueError(
                    "tokens, sequences, length, batch size and temperature must be positive"
                )
        if self.length <= SKIPPED_POSITIONS:
            raise ValueError(
                f"the length must be above {SKIPPED_POSITIONS}, the number of positions that do "
                "not count"
            )
        if self.curve_texts < 0:
            raise ValueError(
                f"the number of texts for the curve must not be negative, but is {self.curve_texts}"
            )
        if not 1 <= self.expert_factor < float("inf"):
            raise ValueError(
                f"the factor for experts with few tokens must be at least 1, not "
                f"{self.expert_factor:g}"
            )
        check_seed(self.seed)
        if self.until_stable is not None and not 0 < self.until_stable < 1:
            raise ValueError(f"--until-stable must be between 0 and 1, not {self.until_stable}")
        if not self.statistics or not {*self.statistics} <= {*PRIOR_STATISTICS}:
            raise ValueError(
                f"statistics must be some of {', '.join(PRIOR_STATISTICS)}, "
                f"not {', '.join(self.statistics) or 'none'}"
            )


def default_recipes(tokenizer: TokenizerWrapper) -> tuple[Recipe, ...]:
    """Return the recipes to measure by default (docs/experiments.md explains the choice)."""
    kinds = ("bos", "chat") if tokenizer.has_chat_template else ("bos",)
    return tuple(map(Recipe, kinds))


def build(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    output: Path,
    settings: CalibrationSettings | None = None,
    name: str = "",
    report: Callable[[str], object] = lambda text: None,
) -> GlobalPrior:
    """Measure a global prior and write it to a file. Repeating the call continues it.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        output: the file to write. A file beside it holds the measurements so far.
        settings: how to measure.
        name: the model's name, which the prior records.
        report: called with the stability so far, a text of several lines, whenever the number of
            tokens has doubled.

    Raises:
        FileNotFoundError: if a corpus does not exist.
        OSError: if a file cannot be written.
        ValueError: if another run is writing the file, or for the reasons given in `calibrate`.
    """
    ranks = Session.of(model).ranks
    ranks.on_first(lambda: check_writable(output))
    partial = None if is_device(output) else output.with_name(f"{output.name}.partial")

    def save(prior: GlobalPrior) -> None:
        prior.save(output)
        if partial is not None:
            for file in (partial, _curves_file(partial)):
                file.unlink(missing_ok=True)

    with ranks.held_by_first(lambda: locked(output)):
        prior = calibrate(model, tokenizer, settings, name=name, checkpoint=partial, report=report)
        ranks.on_first(lambda: save(prior))
    return prior


def _curves_file(checkpoint: Path) -> Path:
    """Return the file beside a checkpoint that holds the texts and results of the curve."""
    return checkpoint.with_name(f"{checkpoint.name}.curves")


def calibrate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: CalibrationSettings | None = None,
    *,
    name: str = "",
    checkpoint: Path | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> GlobalPrior:
    """Measure a global prior.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        settings: how to measure.
        name: the model's name, which the prior records.
        checkpoint: a file for the measurements so far, written after every batch. If the file
            exists, the calibration continues from it.
        report: see `build`.

    Raises:
        FileNotFoundError: if a corpus does not exist.
        ValueError: if the model cannot be sliced, a recipe does not suit the tokenizer or gives no
            text, or the checkpoint comes from another calibration.
    """
    settings = settings or CalibrationSettings()
    session = Session.of(model)
    ranks = session.ranks
    if ranks.size > 1 and IMPACT in settings.statistics:
        raise ValueError("the statistic impact can be measured on one machine only")
    mixture = _start_mixture(session, tokenizer, settings)
    weights = session.fingerprint
    about = _describe(model, settings, name)
    identity = json.dumps(
        [
            about,
            settings.statistics,
            [recipe.identity for recipe in mixture.recipes],
            [session.weight_bytes, sum(float(sample.sum()) for sample in weights.samples.values())],
        ]
    )
    if checkpoint:
        ranks.on_first(lambda: restore_checkpoint(checkpoint, mixture, identity))
        mixture = ranks.share(mixture)

    def save() -> None:
        if checkpoint and ranks.is_first:
            save_checkpoint(checkpoint, mixture, identity)

    stability = _measure_mixture(session, tokenizer, mixture, settings, save, report)
    prior = _make_prior(mixture, weights, about | {"stability": stability})
    if settings.curve_texts and GlassConfig.prior_statistic in settings.statistics:
        partial = None if checkpoint is None else _curves_file(checkpoint)
        prior = _with_curve(session, tokenizer, prior, settings, partial, identity)
    return prior


def _start_mixture(
    session: Session, tokenizer: TokenizerWrapper, settings: CalibrationSettings
) -> Mixture:
    """Return the recipes to measure, without any measurements yet."""
    recipes = [
        MeasuredRecipe(
            recipe,
            recipe.identity(),
            SequenceMoments(session.whole_shapes, settings.statistics, session.vocabulary_size),
            chat_frame(tokenizer) if recipe.kind == "chat" else None,
        )
        for recipe in settings.recipes or default_recipes(tokenizer)
    ]
    return Mixture(recipes, settings.statistics)


def _describe(model: nn.Module, settings: CalibrationSettings, name: str) -> dict[str, Any]:
    """Return the description of the model and the settings that the prior records."""
    listed_elsewhere = ("recipes", "statistics", "curve_texts")
    return made_with() | {
        "model": name,
        "model_type": getattr(model, "model_type", ""),
        "dtype": _float_type(model),
        "settings": {
            key: value
            for key, value in asdict(settings).items()
            if key not in listed_elsewhere and value is not None
        },
    }


def _float_type(model: nn.Module) -> str:
    """Return the type of the model's first floating-point array, which the model computes in."""
    dtypes = (array.dtype for _, array in named_arrays(model))
    dtype = next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))
    return str(dtype).removeprefix("mlx.core.")


def _measure_mixture(
    session: Session,
    tokenizer: TokenizerWrapper,
    mixture: Mixture,
    settings: CalibrationSettings,
    save: Callable[[], None],
    report: Callable[[str], object],
) -> dict[str, Stability]:
    """Write and read batch after batch until enough is measured.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        mixture: the recipes, to which the measurements are added.
        settings: how to measure.
        save: called after every batch.
        report: see `build`.

    Returns:
        The stability; see `Mixture.stability`.
    """
    total = settings.sequences * settings.length if settings.sequences else settings.tokens
    with (
        tqdm(total=total, initial=mixture.tokens, unit="tok", dynamic_ncols=True) as bar,
        wired_limit(session.model, [generation_stream]),  # type: ignore[list-item]
    ):
        sources = _make_sources(
            session.model,
            tokenizer,
            mixture,
            settings,
            lambda written: bar.update(max(0, min(written, bar.total - bar.n))),
        )
        stability = mixture.stability()
        while (step := _next_batch(mixture, settings, stability)) is not None:
            recipe, size = step
            bar.set_description("writing" if recipe.recipe.file is None else None)
            sequences = sources[recipe](size, recipe.batches)
            if not sequences:
                recipe.exhausted = True
                continue
            tokens_before = mixture.tokens
            bar.set_description("reading")
            measure_sequences(session, sequences, settings.statistics, recipe.moments)
            mx.clear_cache()
            recipe.batches += 1
            save()
            stability = mixture.stability()
            _show_progress(bar, total, mixture, settings, stability)
            if tokens_before.bit_length() < bar.n.bit_length():  # at every doubling
                peak = f"peak memory {mx.get_peak_memory() / 1e9:.3f} GB"
                lines = [f"after {bar.n} tokens, {peak}:", *stability_lines(stability)]
                report("\n".join(lines))
    return stability


def _show_progress(
    bar: "tqdm[Any]",
    total: int,
    mixture: Mixture,
    settings: CalibrationSettings,
    stability: dict[str, Stability],
) -> None:
    """Show the tokens measured so far, the stability, and the experts that need more tokens."""
    facts = {"stability": f"{overall_stability(stability):.3f}" if stability else "none yet"}
    bar.n, bar.total = mixture.tokens, max(total, mixture.tokens)
    if short := _short_experts(mixture, settings):
        facts["experts"] = f"{sum(int(lacking.sum()) for lacking in short.values())} need more"
        if bar.n >= total:
            bar.total = bar.n + math.ceil(_further_tokens(mixture, settings))
    bar.set_postfix(facts)


def _make_sources(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    mixture: Mixture,
    settings: CalibrationSettings,
    progress: Callable[[int], object],
) -> dict[MeasuredRecipe, BatchSource]:
    """Return the source of each recipe's texts. Each recipe has its own seed."""
    return {
        recipe: make_source(
            recipe.recipe,
            Writer(model, settings.temperature, [settings.seed, n], progress),
            tokenizer,
            settings.length,
            recipe.frame,
            settings.corpus_field,
            recipe.sequences,
        )
        for n, recipe in enumerate(mixture.recipes)
    }


def _next_batch(
    mixture: Mixture, settings: CalibrationSettings, stability: dict[str, Stability]
) -> tuple[MeasuredRecipe, int] | None:
    """Choose the next recipe and its number of sequences, or return None if enough is measured."""
    if (
        settings.until_stable
        and stability
        and overall_stability(stability) >= settings.until_stable
    ):
        return None
    tokens, sequences = mixture.tokens, mixture.sequences
    if settings.sequences is not None:
        remaining = settings.sequences - sequences
    else:
        tokens_per_sequence = tokens / sequences if sequences else settings.length
        remaining = math.ceil((settings.tokens - tokens) / tokens_per_sequence)
    # Every recipe is measured on at least one sequence.
    recipes = [
        r for r in mixture.recipes if not r.exhausted and (remaining > 0 or r.sequences == 0)
    ]
    if recipes:
        recipe = min(recipes, key=lambda r: r.moments.tokens / r.recipe.weight)
        return recipe, max(1, min(settings.batch_size, remaining))
    if short := _short_experts(mixture, settings):
        remaining = math.ceil(_further_tokens(mixture, settings) * sequences / tokens)
        return mixture.best_recipe(short), min(settings.batch_size, remaining)
    return None


def _short_experts(mixture: Mixture, settings: CalibrationSettings) -> dict[str, np.ndarray]:
    """Return the experts for which more should be measured; see `Mixture.short_experts`."""
    return mixture.short_experts(MIN_EXPERT_TOKENS, _further_tokens(mixture, settings))


def _further_tokens(mixture: Mixture, settings: CalibrationSettings) -> float:
    """Return how many tokens may still be measured, for experts with few tokens."""
    if settings.sequences is None:
        return max(0.0, settings.expert_factor * settings.tokens - mixture.tokens)
    further = max(0.0, settings.expert_factor * settings.sequences - mixture.sequences)
    return further * mixture.tokens / max(1, mixture.sequences)


def _make_prior(mixture: Mixture, weights: Fingerprint, about: dict[str, Any]) -> GlobalPrior:
    """Make a prior from the measurements of all recipes.

    Args:
        mixture: the recipes and their measurements.
        weights: the model's fingerprint.
        about: the description of the model and the settings, to which the texts are added.

    Raises:
        ValueError: if a recipe gave no text.
    """
    for recipe in mixture.recipes:
        if recipe.sequences == 0:
            raise ValueError(f"the recipe {recipe.recipe.name} gave no text to measure")
    about = about | {
        "recipes": [recipe.describe() for recipe in mixture.recipes],
        "tokens": mixture.tokens,
        "sequences": mixture.sequences,
    }
    stacks = mixture.recipes[0].moments.routed
    scores, spread = (
        {
            name: {path: values(name, path).astype(np.float32) for path in weights.samples}
            for name in mixture.statistics
        }
        for values in (mixture.mean, mixture.spread)
    )
    routed = {path: mixture.routed(path).astype(np.float32) for path in stacks}
    vocabulary = mixture.vocabulary.astype(np.float32)
    return GlobalPrior(scores, weights, about, spread, vocabulary, routed)


def _with_curve(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    settings: CalibrationSettings,
    partial: Path | None,
    identity: str,
) -> GlobalPrior:
    """Return the prior with a curve, or unchanged if the model writes no suitable text.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        prior: the prior.
        settings: how to measure.
        partial: the file for the results so far; see `CurveMeasurement`.
        identity: everything that the prior depends on, as text.
    """
    texts = CurveSettings(settings.curve_texts, seed=settings.seed)
    with (
        tqdm(total=texts.trial_readings + texts.texts, desc="curve", unit="read") as bar,
        wired_limit(session.model, [generation_stream]),  # type: ignore[list-item]
    ):
        try:
            measurement = CurveMeasurement(session, tokenizer, texts, partial, identity, bar.update)
        except ValueError as error:
            bar.write(f"no curve: {error}", file=sys.stderr)
            return prior
        about = prior.about | {"whole": measurement.choose_kept_dense(prior)}
        prior = replace(prior, about=about)
        curve = measurement.measure(prior, GlassConfig())
    return replace(prior, about=about | {"curves": [curve]})
