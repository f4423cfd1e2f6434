"""What a prior is, in words and in a picture."""

from pathlib import Path
from typing import Any

from glass_mlx.files import replacing
from glass_mlx.models import layer_order
from glass_mlx.prior import GlobalPrior
from glass_mlx.stability import Stability

import numpy as np


def _recipe_line(recipe: dict[str, Any]) -> str:
    """One line on a text that a prior was measured on."""
    name = recipe.get("recipe", "?")
    source = f" {recipe['file']}" if "file" in recipe else ""
    return (
        f"{name}{source}, weight {recipe.get('weight', 1)}: "
        f"{recipe.get('tokens', 0)} tokens in {recipe.get('sequences', 0)} sequences"
    )


def describe(prior: GlobalPrior) -> str:
    """Say what a prior is: its model, recipe and tokens, and its stability by layer.

    Stability compares two priors, each from one half of the sequences: Spearman's correlation of
    their ranks, and the Jaccard index of the neurons that they keep at some densities.
    """
    about = prior.about
    settings = [f"{key} {value}" for key, value in about.get("settings", {}).items()]
    versions = about.get("versions", {})
    lines = [
        f"model       {about.get('model', '?')} ({about.get('model_type', '?')})",
        *(f"recipe      {_recipe_line(recipe)}" for recipe in about.get("recipes", [])),
        f"settings    {', '.join(settings)}",
        f"tokens      {about.get('tokens', '?')}",
        f"statistics  {', '.join(prior.scores)}",
        f"made with   {', '.join(f'{k} {v}' for k, v in versions.items())}"
        f" on {about.get('machine', '?')}, {about.get('dtype', '?')}",
    ]
    if curve := about.get("curve"):
        pairs = zip(curve["densities"], curve["kl"], strict=True)
        points = ", ".join(f"{kl:.3f} at {density:g}" for density, kl in pairs)
        lines.append(f"KL          {points} (nats a token, {curve['tokens']} tokens of its own)")
    if prior.whole:
        lines.append(f"kept whole  {', '.join(prior.whole)}")
    for statistic, measures in about.get("stability", {}).items():
        lines += ["", f"stability of {statistic}", *_stability_table(prior, measures)]
    return "\n".join(lines)


def _stability_table(prior: GlobalPrior, measures: Stability) -> list[str]:
    paths = sorted(next(iter(prior.scores.values())), key=layer_order)
    rows = [[measure.get(path, float("nan")) for measure in measures.values()] for path in paths]
    width = max(map(len, paths))
    table = [f"{'':{width}}" + "".join(f"{name:>15}" for name in measures)]
    for path, row in zip([*paths, "mean"], [*rows, np.mean(rows, axis=0)], strict=True):
        table.append(f"{path:{width}}" + "".join(f"{value:15.3f}" for value in row))
    return table


def stability_lines(stability: dict[str, Stability]) -> list[str]:
    """The same in a line a measure, for progress: its mean, and hundredths layer by layer."""
    return [
        f"{statistic:10} {name:12} {np.mean([*measure.values()]):.3f}  by layer "
        + " ".join(f"{100 * value:3.0f}" for value in measure.values())
        for statistic, measures in stability.items()
        for name, measure in measures.items()
    ]


def draw(prior: GlobalPrior, file: Path) -> None:
    """Draw a prior's scores by layer and neuron rank into a PNG.

    Every layer is a row. Its neurons are sorted by their score, the most important on the left,
    and coloured by their share of the layer's largest score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = 512
    figure = Figure(figsize=(7, 1 + 2.6 * len(prior.scores)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(prior.scores), squeeze=False)[:, 0]
    for panel, (statistic, scores) in zip(panels, prior.scores.items(), strict=True):
        grid = []
        for path in sorted(scores, key=layer_order):
            values = scores[path]
            ordered = np.sort(values)[::-1] / max(values.max(), np.finfo(np.float32).tiny)
            grid.append(
                np.interp(np.linspace(0, 1, columns), np.linspace(0, 1, len(values)), ordered)
            )
        image = panel.imshow(
            np.maximum(grid, 1e-6),
            aspect="auto",
            extent=(0, 1, len(grid) - 0.5, -0.5),
            interpolation="nearest",
            norm=LogNorm(1e-3, 1),
        )
        panel.set(title=statistic, ylabel="layer", xlabel="rank of the neuron, as a share of all")
        figure.colorbar(image, ax=panel, label="score / largest of the layer")
    figure.suptitle(
        f"Prior of {prior.about.get('model', '?')}: {prior.about.get('tokens', '?')} tokens"
    )
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
