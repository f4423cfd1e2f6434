"""On Linux: put the system's OpenBLAS in front of the reference BLAS of MLX's CPU wheel."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path


def prefer_openblas() -> None:
    """Load the system's OpenBLAS, if there is one, so that MLX's float32 products use it.

    MLX's CPU wheel is linked against a reference BLAS, on which a float32 product of matrices
    is 30 to 80 times slower. A library that is loaded globally before `mlx.core` takes precedence.
    On macOS MLX uses Accelerate or the GPU, and nothing is done.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)


def has_openblas() -> bool:
    """Whether OpenBLAS is in this process."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libopenblas" in maps.read_text()
