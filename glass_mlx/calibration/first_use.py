"""Measure what is missing when a model is used for the first time: a small prior, and its curve.

Both are kept in the user's cache.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from glass_mlx.budget import Budget
from glass_mlx.calibration.building import CalibrationSettings, build
from glass_mlx.calibration.curves import CurveMeasurement, CurveSettings
from glass_mlx.calibration.resume import StaleCheckpointError
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.config import GlassConfig
from glass_mlx.errors import one_line
from glass_mlx.files import LockedError, is_locked, locked, write_text
from glass_mlx.kept_tokens import KeptTokens
from glass_mlx.prior.curves import Curve
from glass_mlx.prior.file import GlobalPrior, cache_name, cached_priors
from glass_mlx.prior.lookup import NoPriorError, folder_address, model_folder
from glass_mlx.selection import Selector
from glass_mlx.session import Session
from glass_mlx.statistics import STATISTICS

from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

# A prior of two thousand tokens is nearly as good as a large one (docs/experiments.md).
# Experts with few tokens get at most twice as many, because a first use should not take long.
SMALL = CalibrationSettings(sequences=24, length=128, batch_size=12, expert_factor=2.0)

_FAILED = "no prior can be measured for this model"
_ALTERNATIVE = "select neurons from the prompt alone with --no-prior, or in Python with prior=False"


def find_or_measure_prior(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | str | Path | None = None,
    config: GlassConfig | None = None,
    model: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior; if there is none, measure a small one and keep it in the user's cache.

    The measurement shows its progress on standard error. It can be interrupted, and continues at
    the next use.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        prior: see `Session.find_prior`.
        config: how the model will be sliced. The prior gets the statistic that it ranks by and,
            for a bound on KL, a curve. Default: `GlassConfig()`.
        model: the model's hub id or path. Default: where the tokenizer was loaded from.
        report: called with a line for each place that was searched.

    Raises:
        FileNotFoundError: if the given prior does not exist.
        OSError: if the user's cache cannot be written.
        ValueError: if the given prior does not fit, or no prior can be measured.
    """
    folder = model_folder(tokenizer)
    model = model or folder_address(folder)
    try:
        return session.find_prior(prior, folder, model, report)
    except NoPriorError:
        pass
    name = model_name(model)
    file = cached_priors() / f"{cache_name(name, session.fingerprint)}.safetensors"
    better = f"glass-mlx calibrate --model {model} --output {file}"
    print(
        "prior: this model has none yet. Measuring a small one once, on "
        f"{SMALL.sequences} texts by the model, into {file} (for a better one: {better}; for none: "
        "--no-prior, in Python prior=False)",
        file=sys.stderr,
    )
    settings = _settings(session, config or GlassConfig())
    try:
        _measure(session, tokenizer, file, settings, name)
    except LockedError:
        print("prior: waiting for another process that measures it", file=sys.stderr)
        session.ranks.on_first(lambda: _wait_for(file))
        return find_or_measure_prior(session, tokenizer, prior, config, model, report)
    except ValueError as error:
        raise ValueError(f"{_FAILED}: {one_line(error)}; {_ALTERNATIVE}") from error
    except OSError as error:
        raise OSError(f"{_FAILED}: {one_line(error)}; {_ALTERNATIVE}") from error
    match = session.find_prior(prior, folder, model)
    report(f"using {match.title}")
    return match


def find_needed_prior(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | str | Path | None = None,
    config: GlassConfig | None = None,
    model: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior | None:
    """Find a model's prior, and measure one only if the text depends on it.

    The dense model's own text does not. A prior that is found makes it faster all the same.

    Args:
        session: the model's session; see `find_or_measure_prior`, also for the other arguments and
            the errors.

    Returns:
        The prior, or None if there is none and none is needed.
    """
    if prior is None and (config or GlassConfig()).is_exact:
        folder = model_folder(tokenizer)
        with suppress(NoPriorError):
            return session.find_prior(prior, folder, model or folder_address(folder), report)
        return None
    return find_or_measure_prior(session, tokenizer, prior, config, model, report)


def _wait_for(file: Path) -> None:
    """Wait until no process writes a file."""
    while is_locked(file):
        time.sleep(0.5)


def _settings(session: Session, config: GlassConfig) -> CalibrationSettings:
    """Return the settings of a small prior with everything that a configuration needs.

    A prior is built with the curve of the default settings; others are measured afterwards.
    """
    is_default = session.conditions(config) == session.conditions(GlassConfig())
    return replace(
        SMALL,
        statistics=tuple(dict.fromkeys((*STATISTICS, config.prior_statistic))),
        curve_texts=SMALL.curve_texts if config.has_budget and is_default else 0,
    )


def _measure(
    session: Session,
    tokenizer: TokenizerWrapper,
    file: Path,
    settings: CalibrationSettings,
    name: str,
) -> None:
    """Measure a prior into a file, and continue an interrupted measurement if it has begun."""
    try:
        build(session.model, tokenizer, file, settings, name)
    except StaleCheckpointError as error:  # of other settings or versions: of no use any more
        stale = error.file
        session.ranks.on_first(lambda: stale.unlink(missing_ok=True))
        build(session.model, tokenizer, file, settings, name)


def make_selector(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    config: GlassConfig,
    more: Iterable[int] = (),
) -> Selector:
    """Return the selector of a generation; see `find_or_measure_budget` for a bound on KL.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        prior: its prior, or None if there is none.
        config: how the model will be sliced.
        more: further tokens that every shortlist keeps; see `KeptTokens`.
    """
    budget = None
    if config.bound:
        budget = find_or_measure_budget(session, tokenizer, prior, config)
    return session.selector(config, prior, budget, KeptTokens(tokenizer, more))


def find_or_measure_budget(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    config: GlassConfig,
) -> Budget:
    """Return how a model's bound on KL is spent; if its curve is not known, measure it.

    A curve holds for a prior, a number format and settings. One that the prior does not have is
    kept in the user's cache. The measurement shows its progress on standard error. It can be
    interrupted, and continues at the next use.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        prior: its prior, or None if there is none.
        config: how the model will be sliced, with a bound on KL.

    Raises:
        OSError: if the user's cache cannot be written.
        ValueError: if the curve cannot be measured.
    """
    conditions = session.conditions(config)
    curve = _known_curve(session, prior, conditions)
    if curve is None:
        curve = _measure_curve(session, tokenizer, prior, config, conditions)
    assert config.bound is not None
    return Budget.spend(config.bound, curve)


def is_measured(session: Session, prior: GlobalPrior | None, config: GlassConfig) -> bool:
    """Return whether it is known what slicing costs, as far as a configuration depends on it."""
    if not config.bound:
        return True
    return _known_curve(session, prior, session.conditions(config)) is not None


def _known_curve(
    session: Session, prior: GlobalPrior | None, conditions: dict[str, Any]
) -> Curve | None:
    """Return the curve that a prior has, or the one in the user's cache; None if there is none."""
    curve = None if prior is None else prior.curve(conditions)
    if curve is not None:
        return curve
    file, _ = _curve_file(session, prior, conditions)
    return session.ranks.on_first(lambda: _read_curve(file, conditions))


def _curve_file(
    session: Session, prior: GlobalPrior | None, conditions: dict[str, Any]
) -> tuple[Path, str]:
    """Return the file of a curve in the user's cache, and a digest of what it holds for."""
    key = [conditions, None if prior is None else prior.digest]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    name = f"{cache_name('curves', session.fingerprint)}-{digest}.json"
    return cached_priors().with_name("curves") / name, digest


def _measure_curve(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    config: GlassConfig,
    conditions: dict[str, Any],
) -> Curve:
    """Measure a curve, and keep it in the user's cache."""
    file, digest = _curve_file(session, prior, conditions)
    ranks = session.ranks
    print(
        "curve: what slicing costs is not known yet for this model with these settings. Measuring "
        f"it once, into {file} (to choose by hand: --density)",
        file=sys.stderr,
    )
    settings = CurveSettings(SMALL.curve_texts)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with (
            ranks.held_by_first(
                lambda: locked(file, waiting="curve: waiting for another process that measures it")
            ),
            tqdm(total=settings.texts, desc="curve", unit="read") as bar,
            wired_limit(session.model, [generation_stream]),  # type: ignore[list-item]
        ):
            if (curve := ranks.on_first(lambda: _read_curve(file, conditions))) is not None:
                return curve  # another process measured it meanwhile
            measurement = CurveMeasurement(
                session, tokenizer, settings, partial, digest, bar.update
            )
            record = measurement.measure(prior, config)
            if ranks.is_first:
                write_text(file, json.dumps(record))
                partial.unlink(missing_ok=True)
    except ValueError as error:
        raise ValueError(
            f"what slicing costs cannot be measured for this model: {one_line(error)}; give "
            "--density (density=)"
        ) from error
    return Curve.parse(record)


def _read_curve(file: Path, conditions: dict[str, Any]) -> Curve | None:
    """Read a curve, or return None if the file is missing, damaged or of other conditions."""
    try:
        record = json.loads(file.read_text())
        return Curve.parse(record) if record["conditions"] == conditions else None
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
