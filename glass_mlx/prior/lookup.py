"""Find a model's prior: from the user, in the model's folder, the cache, or this package."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from glass_mlx.models import Fingerprint, world
from glass_mlx.prior.file import (
    FILE_NAME,
    GlobalPrior,
    cached_priors,
    packaged_priors,
    prior_files,
)
from glass_mlx.prior.hub import locate
from glass_mlx.statistics import Shape

from mlx_lm.tokenizer_utils import TokenizerWrapper


class NoPriorError(ValueError):
    """The error that none of the places searched has a prior for the model."""


def model_folder(tokenizer: TokenizerWrapper) -> Path | None:
    """Return the folder that a model's tokenizer was loaded from, or None.

    mlx-lm loads the model from the same folder.
    """
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def folder_address(folder: Path | None) -> str:
    """Return the hub id of a model in the hub's cache, or the path of any other model's folder."""
    if folder is None:
        return "MODEL"
    repository = folder.parent.parent.name  # in the hub's cache: models--USER--REPO/snapshots/HASH
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return str(folder)


def given_prior(name: str | None) -> GlobalPrior | None:
    """Load the prior that a flag names, a file or `hub:user/repo`; None without a name.

    Of several ranks, rank 0 reads the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged or cannot be downloaded.
    """
    if not name:
        return None
    return world().on_first(lambda: GlobalPrior.load(locate(name)))


def find_prior(
    shapes: Mapping[str, Shape],
    weights: Fingerprint,
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it belongs to the model.

    Args:
        shapes: the number of neurons m of each FFN of the model, or (experts, m), by path.
        weights: the model's fingerprint.
        prior: a prior, the file of a prior, or `hub:user/repo` to fetch it from the hub. Default:
            search the model's folder, the user's cache and this package, in this order. A related
            model's prior is used only if no place has the model's own.
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
        match = prior.fitted(shapes, weights)
        report(f"using {match.title}")
        return match
    relatives = []
    for place in (cached_priors(), packaged_priors()):
        for candidate in _search(place, shapes, weights, report):
            if candidate.fingerprint.is_same_model(weights):
                report(f"using {candidate.title}")
                return candidate
            relatives.append(candidate)
        report(f"none for this model in {place}")
    if relatives:
        match = max(relatives, key=lambda relative: relative.fingerprint.similarity(weights))
        report(f"using {match.title}")
        return match
    raise NoPriorError(
        "there is no prior for this model; stream_generate and the commands measure a small one on "
        f"first use, and `glass-mlx calibrate --model {name} --output {FILE_NAME}` measures a "
        "better one"
    )


def _search(
    folder: Path,
    shapes: Mapping[str, Shape],
    weights: Fingerprint,
    report: Callable[[str], object],
) -> Iterator[GlobalPrior]:
    """Yield the priors in a folder that fit a model.

    Args:
        folder: the folder.
        shapes: the number of neurons m of each FFN of the model, or (experts, m), by path.
        weights: the model's fingerprint.
        report: called with one line for each file that cannot be used.
    """
    for file in prior_files(folder):
        try:
            if not GlobalPrior.read_fingerprint(file).similarity(weights):
                continue
            prior = GlobalPrior.load(file).fitted(shapes, weights)
        except ValueError as error:  # one damaged file must not block all models
            report(f"skipping a file: {error}")
        else:
            yield prior
