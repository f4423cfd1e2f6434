"""Where a model's prior is looked for."""

from collections.abc import Callable
from pathlib import Path

from glass_mlx.hub import locate
from glass_mlx.models import find_ffns, fingerprint
from glass_mlx.prior import (
    BUILD_COMMAND,
    FILE_NAME,
    GlobalPrior,
    cached_priors,
    packaged_priors,
    stored_in,
)

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper


def model_folder(tokenizer: TokenizerWrapper) -> Path | None:
    """The folder that a model's tokenizer, and so the model, was loaded from, if it was."""
    path = Path(getattr(tokenizer, "name_or_path", None) or "/dev/null")
    return path if path.is_dir() else None


class NoPriorError(ValueError):
    """There is no prior for a model in any of the places where priors are looked for."""


def resolve_prior(
    model: nn.Module,
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it fits.

    Args:
        model: the model.
        prior: a prior, the file of one, or `hub:user/repo`, which is fetched. Default: looked for
            in the model's folder, the user's cache and this package, in that order.
        folder: where the model's files are, if that is known.
        name: how the user calls the model, for the command that builds a prior.
        report: called with a line on each place that was looked in.

    Raises:
        FileNotFoundError: if the given file does not exist.
        NoPriorError: if none is found.
        ValueError: if the prior that was given, or is in the model's folder, is damaged or belongs
            to another model, or if it cannot be fetched.
    """
    widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
    weights = fingerprint(model)
    if prior is None and folder:
        if (folder / FILE_NAME).is_file():
            prior = folder / FILE_NAME
        else:
            report(f"no {FILE_NAME} in the model's folder {folder}")
    if prior is not None:
        prior = prior if isinstance(prior, GlobalPrior) else GlobalPrior.load(locate(prior))
        if reason := prior.mismatch(widths, weights):
            raise ValueError(f"the prior {prior.source} is not for this model: {reason}")
        report(f"using {prior.source or 'the given one'}")
        return prior
    for place in (cached_priors(), packaged_priors()):
        for file in stored_in(place):
            try:
                found = GlobalPrior.load(file) if GlobalPrior.resembles(file, weights) else None
            except ValueError as error:  # one bad file must not stand in the way of all models
                report(f"passing over a file: {error}")
                continue
            if found is not None and found.mismatch(widths, weights) is None:
                report(f"using {found.source}")
                return found
        report(f"none for this model in {place}")
    command = BUILD_COMMAND.format(model=name)
    raise NoPriorError(
        "there is no prior for this model; have a small one built now with --build-prior, build "
        f"one with `{command}` (without a clone: `python -m glass_mlx.calibration` with the same "
        "arguments) and give it with --prior, or select by the prompt alone with --no-prior"
    )
