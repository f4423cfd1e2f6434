"""The checkpoint of a calibration, from which an interrupted run continues."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from glass_mlx.calibration.mixture import Mixture
from glass_mlx.calibration.texts import ChatFrame
from glass_mlx.files import read_tensors, write_tensors

import numpy as np

FORMAT = "glass-calibration-2"


class StaleCheckpointError(ValueError):
    """The error that a checkpoint is damaged, or comes from another calibration.

    Attributes:
        file: the checkpoint.
    """

    def __init__(self, file: Path, message: str) -> None:
        super().__init__(message)
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a pickle of the error holds, for other processes."""
        return type(self), (self.file, str(self))


def save_checkpoint(file: Path, mixture: Mixture, identity: str) -> None:
    """Write the measurements so far.

    Args:
        file: the file.
        mixture: the recipes with their sums.
        identity: everything that the result depends on, as text.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for n, recipe in enumerate(mixture.recipes):
        state = recipe.moments.state() | {"batches": np.array([recipe.batches])}
        tensors |= {f"{n}.{key}": values for key, values in state.items()}
    frames = [recipe.frame and asdict(recipe.frame) for recipe in mixture.recipes]
    write_tensors(file, tensors, FORMAT, {"identity": identity, "frames": frames})


def restore_checkpoint(file: Path, mixture: Mixture, identity: str) -> None:
    """Continue from the checkpoint of an interrupted calibration, if there is one.

    Args:
        file: the checkpoint.
        mixture: the recipes, whose sums, batches and chat frames are restored.
        identity: everything that the result depends on, which must be the same as before.

    Raises:
        StaleCheckpointError: if the checkpoint is damaged, or comes from another calibration.
    """
    if not file.is_file():
        return
    try:
        tensors, about, _ = read_tensors(file, FORMAT)
    except ValueError as error:
        raise StaleCheckpointError(file, f"{error}; delete it to begin again") from error
    if about["identity"] != identity:
        raise StaleCheckpointError(
            file,
            f"{file} is from another calibration that was interrupted; finish that calibration "
            "with its original arguments, or delete the file",
        )
    for n, (recipe, frame) in enumerate(zip(mixture.recipes, about["frames"], strict=True)):
        prefix = f"{n}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        recipe.moments.restore(state)
        recipe.batches = int(state["batches"][0])
        # A template may contain the date, so the template's text comes from the first run.
        recipe.frame = frame and ChatFrame(**frame)
