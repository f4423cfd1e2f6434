"""Priors on the Hugging Face hub: fetching one that the user names, and publishing one."""

import re
import tempfile
from pathlib import Path

from glass_mlx.describe import describe
from glass_mlx.files import one_line
from glass_mlx.prior import FILE_NAME, GlobalPrior

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download

PREFIX = "hub:"


def locate(prior: str | Path) -> Path:
    """Return the file of a prior: a path as it is, `hub:user/repo` by way of the hub's cache.

    `hub:user/repo@revision` names a branch, tag or commit.

    Raises:
        ValueError: if the repository or the file in it cannot be had.
    """
    if not str(prior).startswith(PREFIX):
        return Path(prior).expanduser()
    repository, _, revision = str(prior).removeprefix(PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, FILE_NAME, revision=revision or None))
    except Exception as error:  # from the hub, its cache, the network or the name
        raise ValueError(
            f"{FILE_NAME} cannot be fetched from {prior}: {one_line(error)}"
        ) from error


def model_card(prior: GlobalPrior, repository: str) -> ModelCard:
    """A model card that says what a prior is, how it was made and how to use it."""
    model = str(prior.about.get("model", ""))
    data = ModelCardData(
        base_model=model if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) else None,
        library_name="mlx",
        tags=["glass-mlx"],
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# GLASS prior of {model or 'a model'}\n\n"
        "How important each feed-forward neuron of the model is in general, for decoding with "
        "a part of them (GLASS, [arXiv 2508.14302](https://arxiv.org/abs/2508.14302)) with "
        "glass-mlx:\n\n"
        f"    python -m glass_mlx.generate --model {model or 'MODEL'} "
        f"--prior {PREFIX}{repository}\n\n"
        "## How it was made\n\n"
        f"```\n{describe(prior)}\n```\n"
    )


def publish(prior: GlobalPrior, file: Path, repository: str) -> str:
    """Upload a prior and its model card to a repository, which is created if need be.

    Args:
        prior: the prior, for its card.
        file: the file that it was saved in.
        repository: `user/repo`.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if the hub does not take it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE_NAME).write_bytes(file.read_bytes())
            model_card(prior, repository).save(Path(folder) / "README.md")
            api = HfApi()
            address = api.create_repo(repository, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Add a GLASS prior"
            )
    except Exception as error:  # from the hub, the network or the name
        raise ValueError(
            f"{file} cannot be published to {repository}: {one_line(error)}"
        ) from error
    return str(address)
