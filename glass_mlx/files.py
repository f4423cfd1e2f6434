"""Where this package keeps files, and how it writes them: whole or not at all."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_METADATA = "glass"


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


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.glass-"


@contextmanager
def replacing(target: Path, folder: bool = False) -> Iterator[Path]:
    """Give a temporary file or folder beside `target`, which it becomes if all goes well.

    Whatever happens, `target` is either as it was or complete.

    Args:
        target: the file or folder to write. Its parents are created.
        folder: whether it is a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=target.parent, prefix=_temporary_prefix(target)))
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
def locked(*targets: Path) -> Iterator[None]:
    """Hold files for this process, by a lock file beside the first that is gone afterwards.

    What writers of the files that were killed have left beside them is removed.

    Raises:
        ValueError: if another process holds them.
    """
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    file = targets[0].with_name(f"{targets[0].name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run is writing {targets[0]}; wait for it, or stop it") from error
    try:
        for target in targets:
            for place in target.parent.glob(f"{glob.escape(_temporary_prefix(target))}*/"):
                shutil.rmtree(place, ignore_errors=True)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: filelock notices that a file is gone
        lock.release()


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], kind: str, about: Any) -> None:
    """Write a safetensors file that `read_tensors` can check, by way of a temporary one.

    Its metadata is one entry of JSON, so that the same contents are the same file: `format`,
    `about`, and `digest` over everything else.

    Args:
        file: the file.
        tensors: its tensors.
        kind: the name of its format.
        about: what it is, for JSON.

    Raises:
        OSError: if it cannot be written, as when the disk is full.
    """
    metadata = {"format": kind, "about": about, "digest": digest(tensors, about)}
    with replacing(file) as temporary:
        try:
            save_file(dict(tensors), temporary, {_METADATA: json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error


def read_tensors(file: Path, kind: str) -> tuple[dict[str, np.ndarray], Any]:
    """Read and check a file of `write_tensors`: its tensors, and what it is about.

    Raises:
        ValueError: if it is not complete, not of this kind, not finite or not as it was written.
    """
    try:
        with safe_open(file, "numpy") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            text = (stored.metadata() or {}).get(_METADATA, "")
    except Exception as error:  # a damaged header shows up in many ways
        reason = one_line(error)
        raise ValueError(f"{file} is not a complete safetensors file ({reason})") from error
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise ValueError(f"{file} is not in the format {kind}")
    for key, values in tensors.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{file} has values in {key} that are not finite")
    about = metadata.get("about")
    if digest(tensors, about) != metadata.get("digest"):
        raise ValueError(f"{file} was changed after it was written")
    return tensors, about


def digest(tensors: Mapping[str, np.ndarray], about: Any) -> str:
    """A hash of all that a file of tensors says."""
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        state.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        state.update(np.ascontiguousarray(tensors[key]).tobytes())
    return state.hexdigest()
