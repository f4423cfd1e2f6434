"""Where this package keeps files, and how it writes them: whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder for converted models and priors: $GLASS_MLX_CACHE or the user's cache."""
    return Path(os.environ.get("GLASS_MLX_CACHE") or platformdirs.user_cache_dir("glass-mlx"))


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
