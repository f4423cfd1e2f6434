"""Converted GGUF files in the cache: made once, checked before use, replaced when out of date."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints import gguf
from glass_mlx.files import cache_folder, discard, locked, replacing, sha256, write_text

# Describes a converted model: its source, the converter's version, and a digest of each file.
_MANIFEST = "glass_conversion.json"

_Manifest = dict[str, Any]


def converted_file(file: Path, dtype: str) -> Path:
    """Return the folder of a converted GGUF file, which is converted now if necessary.

    Args:
        file: the GGUF file.
        dtype: see `gguf.convert`.

    Raises:
        OSError: if the file cannot be read, or the cache cannot be written.
        ValueError: if the file is damaged or its model is not supported.
    """
    status, target = file.stat(), file.resolve()
    source = {"path": str(target), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    key = f"{target} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:12]
    # mlx-lm finds no weights in a folder with one of glob's special characters in its name.
    stem = re.sub(r"[\[\]*?]", "_", file.stem[:100])
    return _converted(f"{stem}-{digest}-{dtype}", dtype, source, lambda: file)


def converted_builtin(name: str, dtype: str, digest: str, find_file: Callable[[], Path]) -> Path:
    """Return the folder of the converted built-in model, which is converted now if necessary.

    Args:
        name: the model's name.
        dtype: see `gguf.convert`.
        digest: the SHA-256 of its GGUF file.
        find_file: returns the GGUF file. It is called only for a new conversion, because the
            file may have to be downloaded.
    """
    return _converted(f"{name}-{dtype}", dtype, {"sha256": digest}, find_file)


def _converted(
    name: str, dtype: str, source: dict[str, Any], find_file: Callable[[], Path]
) -> Path:
    """Return the folder of a converted model; convert the source unless this was done before.

    Args:
        name: the converted model's name in the cache.
        dtype: see `gguf.convert`.
        source: what identifies the source, for the manifest.
        find_file: returns the GGUF file.
    """
    folder = cache_folder() / "models" / name
    if _is_current(folder, source):
        return folder
    with locked(folder, waiting=f"Waiting for another process to convert {name}"):
        if not _is_current(folder, source):
            with replacing(folder, folder=True) as temporary:
                gguf.convert(find_file(), temporary, dtype)
                _write_manifest(temporary, _describe(temporary, source))
            _discard_outdated(folder, source, dtype)
    return folder


def _describe(folder: Path, source: dict[str, Any]) -> _Manifest:
    """Write a new conversion's files out to the disk, and return its manifest."""
    files = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        files[file.name] = {"sha256": sha256(file), "stamp": _stamp(file)}
    return {"converter": gguf.CONVERTER_VERSION, "source": source, "files": files}


def _stamp(file: Path) -> list[int]:
    """Return what changes when a file is written: size, times and inode.

    The time of the last status change cannot be set by a program that restores the other times.
    """
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _read_manifest(folder: Path) -> _Manifest:
    """Return a conversion's manifest; empty if there is none that can be read."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_current(folder: Path, source: dict[str, Any]) -> bool:
    """Return whether a folder holds what today's converter makes of a source, undamaged.

    The digest of a file is compared when the file was written, copied or moved since it was last
    compared. To compare all of them at every load would take 0.7 s per GB (SHA-256, one core).
    """
    manifest = _read_manifest(folder)
    if manifest.get("converter") != gguf.CONVERTER_VERSION or manifest.get("source") != source:
        return False
    try:
        weights = {file.name for file in folder.glob("model*.safetensors")}
        if not weights or not weights <= manifest["files"].keys():
            return False
        stamps = {name: _stamp(folder / name) for name in manifest["files"]}
        changed = [n for n, stamp in stamps.items() if manifest["files"][n]["stamp"] != stamp]
        if any(sha256(folder / n) != manifest["files"][n]["sha256"] for n in changed):
            return False
        for name in changed:
            manifest["files"][name]["stamp"] = stamps[name]
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        return False  # a file is missing, or the manifest is damaged
    if changed:
        with suppress(OSError):  # a cache that cannot be written: compare again next time
            _write_manifest(folder, manifest)
    return True


def _discard_outdated(current: Path, source: dict[str, Any], dtype: str) -> None:
    """Delete conversions of the same file by other converters, or from before the file changed.

    The first converter's manifest does not name its source. Its conversions have the same name
    except for the digest.
    """
    stem = re.escape(current.name[: -len(f"-{12 * 'x'}-{dtype}")])
    same_name = re.compile(rf"{stem}-[0-9a-f]{{12}}-\w+")
    for folder in list(current.parent.iterdir()):
        manifest = _read_manifest(folder)
        other = manifest.get("source")
        if folder == current or not manifest:
            continue
        if "converter" not in manifest:
            is_outdated = "path" in source and same_name.fullmatch(folder.name) is not None
        else:
            is_same_file = isinstance(other, dict) and other.get("path") == source.get("path")
            is_outdated = is_same_file and (
                other != source or manifest["converter"] != gguf.CONVERTER_VERSION
            )
        if is_outdated:
            with suppress(OSError):
                discard(folder)
