"""Find a model's prior: from the user, in the model's folder, the cache, or this package."""

from collections.abc import Callable, Mapping
from pathlib import Path

from glass_mlx.prior.file import (
    BUILD_COMMAND,
    FILE_NAME,
    GlobalPrior,
    cached_priors,
    packaged_priors,
    prior_files,
)
from glass_mlx.prior.hub import locate

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper


class NoPriorError(ValueError):
    """The error that none of the places searched has a prior for the model."""


def model_folder(tokenizer: TokenizerWrapper) -> Path | None:
    """Return the folder that a model's tokenizer was loaded from, or None.

    mlx-lm loads the model from the same folder.
    """
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def find_prior(
    widths: Mapping[str, int],
    weights: Mapping[str, np.ndarray],
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it belongs to the model.

    Args:
        widths: the number of neurons of each FFN of the model, by path.
        weights: the model's `models.fingerprint`.
        prior: a prior, the file of a prior, or `hub:user/repo` to fetch it from the hub. Default:
            search the model's folder, the user's cache and this package, in this order.
        folder: the folder of the model's files, if there is one.
        name: the model's name in the command that the error message suggests.
        report: called with one line for each place searched.

    Raises:
        FileNotFoundError: if the given file does not exist.
        NoPriorError: if no place has a prior for the model.
        ValueError: if the given prior, or the one in the model's folder, is damaged, belongs to
            another model or cannot be fetched.
    """
    if prior is None and folder:
        if (folder / FILE_NAME).is_file():
            prior = folder / FILE_NAME
        else:
            report(f"no {FILE_NAME} in the model's folder {folder}")
    if prior is not None:
        prior = prior if isinstance(prior, GlobalPrior) else GlobalPrior.load(locate(prior))
        if reason := prior.mismatch(widths, weights):
            raise ValueError(f"the prior {prior.source} is not for this model: {reason}")
        report(f"using {prior.source or 'the given prior'}")
        return prior
    for place in (cached_priors(), packaged_priors()):
        match = _search(place, widths, weights, report)
        if match is not None:
            report(f"using {match.source}")
            return match
        report(f"none for this model in {place}")
    command = BUILD_COMMAND.format(model=name)
    raise NoPriorError(
        "there is no prior for this model; measure a small one now with --build-prior, build one "
        f"with `{command}` (without a clone: `python -m glass_mlx.calibrate` with the same "
        "arguments) and give it with --prior, or select from the prompt alone with --no-prior"
    )


def _search(
    folder: Path,
    widths: Mapping[str, int],
    weights: Mapping[str, np.ndarray],
    report: Callable[[str], object],
) -> GlobalPrior | None:
    """Return the first prior in a folder that belongs to a model, or None.

    Args:
        folder: the folder.
        widths: the number of neurons of each FFN of the model, by path.
        weights: the model's `models.fingerprint`.
        report: called with one line for each file that cannot be read.
    """
    for file in prior_files(folder):
        try:
            if GlobalPrior.matches_weights(file, weights):
                prior = GlobalPrior.load(file)
                if prior.mismatch(widths, weights) is None:
                    return prior
        except ValueError as error:  # one damaged file must not block all models
            report(f"skipping a file: {error}")
    return None
