"""Fetch priors from the Hugging Face hub, and publish them there."""

import re
import tempfile
from pathlib import Path

from glass_mlx.errors import one_line
from glass_mlx.files import expand_user
from glass_mlx.prior.display import describe
from glass_mlx.prior.file import FILE_NAME, GlobalPrior

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

PREFIX = "hub:"

_CARD = "README.md"
_CARD_TITLE = "# GLASS prior of"  # marks a card that this module wrote


def locate(prior: str | Path) -> Path:
    """Return the file of a prior, which is fetched into the hub's cache for `hub:user/repo`.

    `hub:user/repo@revision` names a branch, tag or commit. Every other name is the path of a file.

    Raises:
        ValueError: if the repository or its file cannot be fetched.
    """
    if not str(prior).startswith(PREFIX):
        return expand_user(prior)
    repository, _, revision = str(prior).removeprefix(PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, FILE_NAME, revision=revision or None))
    except Exception as error:  # from the hub, its cache, the network or the repository's name
        raise ValueError(
            f"{FILE_NAME} cannot be fetched from {prior}: {one_line(error)}"
        ) from error


def check_repository(name: str) -> None:
    """Raise ValueError unless a repository can have this name."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{name} is not the name of a repository, such as user/repo") from error


def model_card(prior: GlobalPrior, repository: str) -> ModelCard:
    """Return a model card that describes a prior, how it was measured and how to use it."""
    model = str(prior.about.get("model", ""))
    data = ModelCardData(
        base_model=model if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) else None,
        library_name="mlx",
        tags=["glass-mlx"],
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"{_CARD_TITLE} {model or 'a model'}\n\n"
        "The general importance of each feed-forward neuron of the model. glass-mlx uses it to "
        "decode with only some of the neurons (GLASS, "
        "[arXiv 2508.14302](https://arxiv.org/abs/2508.14302)):\n\n"
        f"    python -m glass_mlx.generate --model {model or 'MODEL'} "
        f"--prior {PREFIX}{repository}\n\n"
        "## How it was measured\n\n"
        f"```\n{describe(prior)}\n```\n"
    )


def publish(prior: GlobalPrior, file: Path, repository: str) -> tuple[str, bool]:
    """Upload a prior and its model card to a repository, and create the repository if needed.

    Nothing else in the repository changes. A README that somebody else wrote is kept.

    Args:
        prior: the prior, for the model card.
        file: the file of the prior.
        repository: `user/repo`.

    Returns:
        The URL of the repository, and whether the model card was written.

    Raises:
        ValueError: if the upload fails.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE_NAME).write_bytes(file.read_bytes())
            if writes_card := _may_write_card(api, repository):
                model_card(prior, repository).save(Path(folder) / _CARD)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Add a GLASS prior"
            )
    except Exception as error:  # from the hub, the network or the repository's name
        raise ValueError(
            f"{file} cannot be published to {repository}: {one_line(error)}"
        ) from error
    return str(url), writes_card


def _may_write_card(api: HfApi, repository: str) -> bool:
    """Return whether a repository has no README, or one that `publish` wrote before."""
    if not api.file_exists(repository, _CARD):
        return True
    return _CARD_TITLE in Path(hf_hub_download(repository, _CARD)).read_text(encoding="utf-8")
