"""Where this package keeps files, and how it writes them: whole or not at all."""

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def cache_folder() -> Path:
    """The folder for converted models and priors: $GLASS_MLX_CACHE or the user's cache."""
    return Path(os.environ.get("GLASS_MLX_CACHE") or platformdirs.user_cache_dir("glass-mlx"))


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path, folder: bool = False) -> Iterator[Path]:
    """Give a temporary file or folder beside `target`, which it becomes if all goes well.

    Whatever happens, `target` is either as it was or complete.

    Args:
        target: the file or folder to write. Its parents are created.
        folder: whether it is a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    temporary = place / target.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if folder and target.exists():
            target.rename(place / "old")
        if not folder:
            temporary.chmod(0o644)  # some writers make files that only their owner can read
        temporary.replace(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target` for this process, by a lock file beside it that is gone afterwards.

    What writers of `target` that were killed have left beside it is removed.

    Raises:
        ValueError: if another process holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f"{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                for place in target.parent.glob(f".{glob.escape(target.name)}.*/"):
                    shutil.rmtree(place, ignore_errors=True)
                yield
            finally:
                lock.unlink(missing_ok=True)  # while held: filelock notices that a file is gone
    except Timeout as error:
        raise ValueError(f"another run is writing {target}; wait for it, or stop it") from error


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file, by way of a temporary one beside it.

    Raises:
        OSError: if it cannot be written, as when the disk is full.
    """
    with replacing(file) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        ValueError: if it is not a complete one.
    """
    try:
        with safe_open(file, "numpy") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except Exception as error:  # a damaged header shows up in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a complete safetensors file ({reason})") from error
