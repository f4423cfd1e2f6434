"""The package's cache folder, atomic writes, lock files, and safetensors files with a digest."""

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

from glass_mlx.errors import one_line

import numpy as np
import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_METADATA_KEY = "glass"


def cache_folder() -> Path:
    """Return the folder for converted models and priors.

    $GLASS_MLX_CACHE overrides the user's cache folder.
    """
    return Path(os.environ.get("GLASS_MLX_CACHE") or platformdirs.user_cache_dir("glass-mlx"))


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _umask() -> int:
    """Return the user's umask. It can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@contextmanager
def replacing(target: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file or folder beside `target`, and rename it to `target` on success.

    After an error `target` is unchanged, so `target` is never incomplete.

    Args:
        target: the file or folder to write. Missing parents are created.
        folder: whether `target` is a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=target.parent, prefix=_temporary_prefix(target)))
    temporary = workspace / target.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if folder and target.exists():
            target.rename(workspace / "old")
        if not folder:
            temporary.chmod(0o666 & ~_umask())  # some writers ignore the user's umask
        temporary.replace(target)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically; see `replacing`."""
    with replacing(file) as temporary:
        temporary.write_text(text)


class LockedError(ValueError):
    """The error that another process is writing the same file."""


@contextmanager
def locked(*targets: Path) -> Iterator[None]:
    """Lock files for this process, and delete temporary files that killed writers left behind.

    The lock file is created beside the first target and deleted afterwards.

    Raises:
        LockedError: if another process holds the lock.
    """
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    file = targets[0].with_name(f"{targets[0].name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another run is writing {targets[0]}; wait for it, or stop it"
        raise LockedError(message) from error
    try:
        for target in targets:
            for leftover in target.parent.glob(f"{glob.escape(_temporary_prefix(target))}*/"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        # Delete the file before releasing the lock: filelock notices that a file was deleted.
        file.unlink(missing_ok=True)
        lock.release()


def is_locked(target: Path) -> bool:
    """Return whether another process holds the lock of a file; see `locked`."""
    try:
        with locked(target):
            return False
    except LockedError:
        return True


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.glass-"


def write_tensors(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    kind: str,
    about: Any,
    known_digest: str | None = None,
) -> None:
    """Write a safetensors file that `read_tensors` can check.

    All metadata is one JSON entry with sorted keys, so equal contents give equal files. It holds
    `format`, `about`, and `digest` over everything else. The file is replaced atomically.

    Args:
        file: the file to write.
        tensors: its tensors.
        kind: the name of its format.
        about: a description of its contents, which JSON can represent.
        known_digest: `digest(tensors, about)`, if the caller has it. Default: computed.

    Raises:
        OSError: if the file cannot be written, for example on a full disk.
    """
    metadata = {"format": kind, "about": about, "digest": known_digest or digest(tensors, about)}
    text = json.dumps(metadata, sort_keys=True)
    with replacing(file) as temporary:
        try:
            save_file(dict(tensors), temporary, {_METADATA_KEY: text})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error


def read_about(file: Path, kind: str) -> Any:
    """Read only the description of a file that `write_tensors` wrote, without checking the rest.

    Raises:
        ValueError: if the file has another format.
    """
    with safe_open(file, "numpy") as stored:
        return _parse_metadata(file, stored.metadata(), kind)["about"]


def _parse_metadata(file: Path, stored: dict[str, str] | None, kind: str) -> dict[str, Any]:
    """Return the metadata that `write_tensors` stores, for files of one format only."""
    try:
        metadata = json.loads((stored or {}).get(_METADATA_KEY, ""))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != kind:
        raise ValueError(f"{file} is not in the format {kind}")
    return {"about": None, "digest": None} | metadata


def read_tensors(file: Path, kind: str) -> tuple[dict[str, np.ndarray], Any, str]:
    """Read and check a file that `write_tensors` wrote.

    Returns:
        The tensors, `about`, and their digest.

    Raises:
        ValueError: if the file is incomplete, has another format, has values that are not finite,
            or was changed after it was written.
    """
    try:
        with safe_open(file, "numpy") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            stored_metadata = stored.metadata()
    except Exception as error:  # a damaged header causes exceptions of many types
        reason = one_line(error)
        raise ValueError(f"{file} is not a complete safetensors file ({reason})") from error
    metadata = _parse_metadata(file, stored_metadata, kind)
    for key, values in tensors.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{file} has values in {key} that are not finite")
    about, stored_digest = metadata["about"], metadata["digest"]
    if digest(tensors, about) != stored_digest:
        raise ValueError(f"{file} was changed after it was written")
    return tensors, about, stored_digest


def digest(tensors: Mapping[str, np.ndarray], about: Any) -> str:
    """Return a hash of a file's tensors and description."""
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        state.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        state.update(np.ascontiguousarray(tensors[key]).tobytes())
    return state.hexdigest()
