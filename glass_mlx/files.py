"""The package's cache folder, atomic writes, lock files, and safetensors files with a digest."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_METADATA_KEY = "glass"

# Temporary folders and lock files. Both are removed if the process that made them is gone.
_WORKSPACE_NAME = re.compile(r"\..+\.glass-\w+")
_LOCK_NAME = re.compile(r"\..+\.glass\.lock")

# The file in a temporary folder that its writer holds locked.
_WRITER_LOCK = "writer.lock"

# How often to try for a lock: a process that looks for leftovers holds it for microseconds.
_LOCK_ATTEMPTS = 20


def expand_user(path: str | Path) -> Path:
    """Return a path with ~ replaced by the user's home; the path of an unknown user is kept."""
    return Path(os.path.expanduser(path))  # Path.expanduser fails for an unknown user


def cache_folder() -> Path:
    """Return the folder for converted models and priors.

    $GLASS_MLX_CACHE overrides the user's cache folder.
    """
    folder = os.environ.get("GLASS_MLX_CACHE")
    return expand_user(folder) if folder else Path(platformdirs.user_cache_dir("glass-mlx"))


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


@contextmanager
def replacing(target: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file or folder, and put it in the place of `target` on success.

    After an error or a crash at any moment, `target` is the old one or the new one, and never
    incomplete. If `target` is a link, what it leads to is replaced. A device or pipe, such as
    /dev/null, is written to.

    Args:
        target: the file or folder to write. Missing parents are created.
        folder: whether `target` is a folder.

    Raises:
        OSError: if `target` cannot be written, for example because it is a folder and not a file.
    """
    if target.is_dir() and not folder:
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    if target.exists() and not target.is_dir() and folder:
        raise NotADirectoryError(f"{target} is not a folder; give another name")
    if is_device(target):
        with tempfile.TemporaryDirectory() as place:
            yield Path(place) / target.name
            with (Path(place) / target.name).open("rb") as source, target.open("wb") as device:
                shutil.copyfileobj(source, device)
        return
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(target) as workspace:
        temporary = workspace / "new" / target.name
        (temporary if folder else temporary.parent).mkdir(parents=True)
        yield temporary
        if not folder:
            temporary.chmod(_file_mode(target, workspace))  # some writers ignore the umask
            temporary.replace(target)
        elif target.exists():
            _exchange(temporary, target)
        else:
            temporary.rename(target)


def check_writable(target: Path | None, folder: bool = False) -> None:
    """Check that a file can be written, before the work for it begins.

    Args:
        target: the file to write, or None.
        folder: whether it is a folder, to which files are added.

    Raises:
        OSError: if it cannot be written, with the reason.
    """
    if target is None or (is_device(target) and not folder):
        return
    if target.is_dir() and not folder:
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    with suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()  # fails for a name that is too long
    address = Path(os.path.realpath(target))
    places = [address, *address.parents] if folder else address.parents
    place = next(path for path in places if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"{target} cannot be written in {place}; give another name")


def discard(folder: Path) -> None:
    """Delete a folder, which disappears at once. Processes that have opened its files keep them."""
    with _workspace(folder) as workspace, suppress(FileNotFoundError):
        folder.rename(workspace / folder.name)


def is_device(path: Path) -> bool:
    """Return whether a path is a device or a pipe, which is written to and never replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.parent == Path("/dev")


def _file_mode(target: Path, workspace: Path) -> int:
    """Return the permissions of a new file: the user's, and no more than those of the old file."""
    probe = workspace / "mode"
    probe.touch()  # the umask itself can only be read by setting it
    mode = stat.S_IMODE(probe.stat().st_mode)
    return mode & target.stat().st_mode if target.exists() else mode


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders on the same disk, in one step if the system can."""
    system = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(new), os.fsencode(old)
    try:
        if sys.platform == "darwin":
            failed = system.renamex_np(*paths, 2)  # RENAME_SWAP
        else:
            here = -100  # AT_FDCWD
            failed = system.renameat2(here, paths[0], here, paths[1], 2)  # RENAME_EXCHANGE
    except AttributeError:  # an old C library
        failed = True
    if failed:  # a file system without this operation
        aside = new.with_name(f"{new.name}.old")
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """Make a temporary folder beside `target`, and delete it in the end.

    A lock in the folder shows that its writer is alive. Before, folders of dead writers, which were
    killed, are deleted.
    """
    remove_leftovers(target.parent)
    workspace, lock = _locked_workspace(target)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_workspace(target: Path) -> tuple[Path, int | None]:
    """Return a new temporary folder and its lock, or None on a file system without locks."""
    while True:
        prefix = f".{target.name[:50]}.glass-"
        workspace = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        try:
            lock = _try_lock(workspace / _WRITER_LOCK)
        except FileNotFoundError:
            continue  # another process deleted the folder before it was locked
        except OSError:
            return workspace, None
        if lock is not None:
            return workspace, lock


def _try_lock(file: Path) -> int | None:
    """Create and lock a file without waiting.

    Returns:
        A descriptor that holds the lock until it is closed, or None if another one holds it.

    Raises:
        OSError: if the file cannot be locked.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:  # else its file was deleted in between
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders and lock files in a folder whose processes were killed."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False) and _WORKSPACE_NAME.fullmatch(entry.name):
                _remove_unused(Path(entry), Path(entry) / _WRITER_LOCK)
            elif _LOCK_NAME.fullmatch(entry.name):
                _remove_unused(Path(entry), Path(entry))


def _remove_unused(leftover: Path, lock_file: Path) -> None:
    """Delete a file or folder unless a process holds its lock."""
    with suppress(OSError):  # of another user, or deleted by another process
        lock = _try_lock(lock_file)
        if lock is None:
            return
        if leftover == lock_file:
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically; see `replacing`."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


class LockedError(ValueError):
    """The error that another process is writing the same file."""


@contextmanager
def locked(*targets: Path, waiting: str | None = None) -> Iterator[None]:
    """Lock files for this process, and delete what killed writers left behind beside them.

    The lock file is created beside the first target and deleted afterwards. A device or pipe is not
    locked.

    Args:
        *targets: the files or folders to write.
        waiting: if another process holds the lock, print this line and wait. Default: an error.

    Raises:
        LockedError: if another process holds the lock.
    """
    if is_device(targets[0]):
        yield
        return
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    file = targets[0].with_name(f".{targets[0].name}.glass.lock")
    lock = FileLock(file)
    if not _acquired(lock):
        if waiting is None:
            raise LockedError(f"another run is writing {targets[0]}; wait for it, or stop it")
        print(waiting, file=sys.stderr)
        lock.acquire()
    try:
        for folder in {target.parent for target in targets}:
            remove_leftovers(folder)
        yield
    finally:
        # Delete the file before releasing the lock: filelock notices that a file was deleted.
        file.unlink(missing_ok=True)
        lock.release()


def _acquired(lock: FileLock) -> bool:
    """Try to acquire a lock without waiting; return whether it worked."""
    for _ in range(_LOCK_ATTEMPTS):
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return True
    return False


def is_locked(target: Path) -> bool:
    """Return whether another process holds the lock of a file; see `locked`."""
    try:
        with locked(target):
            return False
    except LockedError:
        return True


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
    _check_regular(file)
    with safe_open(file, "numpy") as stored:
        return _parse_metadata(file, stored.metadata(), kind)["about"]


def _check_regular(file: Path) -> None:
    """Raise ValueError for a device, a pipe or a folder, whose reading may never end."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file")


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
    _check_regular(file)
    try:
        with safe_open(file, "numpy") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            stored_metadata = stored.metadata()
    except Exception as error:  # a damaged header causes exceptions of many types
        raise ValueError(f"{file} is not a complete safetensors file") from error
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
