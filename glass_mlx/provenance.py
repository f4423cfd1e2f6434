"""What something was made with, for the record."""

import platform
from importlib.metadata import version
from typing import Any


def made_with() -> dict[str, Any]:
    """The versions of what computes, and the kind of machine."""
    return {
        "versions": {package: version(package) for package in ("glass-mlx", "mlx", "mlx-lm")},
        "machine": f"{platform.system()} {platform.machine()}",
    }
