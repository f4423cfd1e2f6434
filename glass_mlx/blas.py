"""Replace the reference BLAS of MLX's CPU wheel with the system's OpenBLAS on Linux."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path


def prefer_openblas() -> None:
    """Load the system's OpenBLAS, if it is installed, so that MLX's float32 products use it.

    MLX's CPU wheel is linked against a reference BLAS, which multiplies float32 matrices 30 to 80
    times slower. A library that is loaded globally before `mlx.core` takes precedence.
    On macOS MLX uses Accelerate or the GPU, and this function does nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def has_openblas() -> bool:
    """Return whether this process has loaded OpenBLAS."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libopenblas" in maps.read_text()
