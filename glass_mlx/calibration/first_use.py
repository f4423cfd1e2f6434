"""Measure a small prior when a model without one is used for the first time."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from glass_mlx.calibration.building import CalibrationSettings, build
from glass_mlx.calibration.resume import StaleCheckpointError
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.config import AUTO, GlassConfig
from glass_mlx.errors import one_line
from glass_mlx.files import LockedError, is_locked
from glass_mlx.prior.file import GlobalPrior, cache_name, cached_priors
from glass_mlx.prior.lookup import NoPriorError, folder_address, model_folder
from glass_mlx.session import Session
from glass_mlx.statistics import STATISTICS

from mlx_lm.tokenizer_utils import TokenizerWrapper

# A prior of two thousand tokens is nearly as good as a large one (docs/experiments.md).
SMALL = CalibrationSettings(sequences=24, length=128, batch_size=12, curve_texts=0)

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
            for the density auto, a density curve. Default: `GlassConfig()`.
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
    settings = _settings(config or GlassConfig())
    try:
        _measure(session, tokenizer, file, settings, name)
    except LockedError:
        print("prior: waiting for another process that measures it", file=sys.stderr)
        while is_locked(file):
            time.sleep(0.5)
        return find_or_measure_prior(session, tokenizer, prior, config, model, report)
    except ValueError as error:
        raise ValueError(f"{_FAILED}: {one_line(error)}; {_ALTERNATIVE}") from error
    except OSError as error:
        raise OSError(f"{_FAILED}: {one_line(error)}; {_ALTERNATIVE}") from error
    match = session.find_prior(prior, folder, model)
    report(f"using {match.title}")
    return match


def _settings(config: GlassConfig) -> CalibrationSettings:
    """Return the settings of a small prior with everything that a configuration needs."""
    return replace(
        SMALL,
        statistics=tuple(dict.fromkeys((*STATISTICS, config.prior_statistic))),
        curve_texts=CalibrationSettings.curve_texts if config.density == AUTO else 0,
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
        error.file.unlink(missing_ok=True)
        build(session.model, tokenizer, file, settings, name)
