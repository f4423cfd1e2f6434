"""Draw figures without a display. matplotlib comes with the optional extra `plots`."""

from pathlib import Path
from typing import TYPE_CHECKING

from glass_mlx.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Import matplotlib.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib; install it with: pip install 'glass-mlx[plots]'"
        ) from error


def new_figure(width: float, height: float) -> "Figure":
    """Create a figure of a width and height in inches, with a canvas that needs no display.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", file: Path, dpi: int = 150) -> None:
    """Write a figure as PNG to a temporary file, and rename that to `file`."""
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
