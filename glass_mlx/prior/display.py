"""Describe a prior in words and in a picture."""

from pathlib import Path
from typing import Any

from glass_mlx.models import layer_order
from glass_mlx.prior.curves import Curve
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.reporting.plotting import new_figure, save_figure

import numpy as np

# Values by measure and FFN path; see `calibration.stability`.
Stability = dict[str, dict[str, float]]

# With fewer tokens, an expert's prior says little.
MIN_EXPERT_TOKENS = 32

# So many layers with such experts are named.
_MAX_PLACES = 4

# The number of samples per layer in a picture, and the smallest ratio on its color scale.
_COLUMNS = 512
_MIN_RATIO = 1e-3


def describe(prior: GlobalPrior) -> str:
    """Describe a prior: its model, recipes, tokens and statistics, and its stability by layer.

    The stability compares two priors, each measured on half of the sequences, by Spearman's rank
    correlation and by the Jaccard index of the neurons that they keep at three densities.
    """
    about = prior.about
    settings = [f"{key} {value}" for key, value in about.get("settings", {}).items()]
    versions = [f"{package} {version}" for package, version in about.get("versions", {}).items()]
    lines = [
        f"model       {about.get('model', '?')} ({about.get('model_type', '?')})",
        *(f"recipe      {_describe_recipe(recipe)}" for recipe in about.get("recipes", [])),
        f"settings    {', '.join(settings)}",
        f"tokens      {about.get('tokens', '?')}",
        f"statistics  {', '.join(prior.scores)}",
        f"made with   {', '.join(versions)}"
        f" on {about.get('machine', '?')}, {about.get('dtype', '?')}",
    ]
    for record in about.get("curves", []):
        lines += _curve_lines(record)
    if prior.kept_dense:
        lines.append(f"kept dense  {', '.join(prior.kept_dense)}")
    lines += expert_lines(prior)
    for statistic, measures in about.get("stability", {}).items():
        lines += ["", f"stability of {statistic}", *_stability_table(prior, measures)]
    return "\n".join(lines)


def expert_lines(prior: GlobalPrior) -> list[str]:
    """Say how many tokens the experts of a mixture were measured on, and which have too few.

    Returns:
        One line; two if there are experts with few tokens, and none without experts.
    """
    if not prior.routed:
        return []
    counts = np.concatenate([*prior.routed.values()])
    few = {path: int((own < MIN_EXPERT_TOKENS).sum()) for path, own in prior.routed.items()}
    lines = [
        f"experts     {len(counts)} in {len(few)} layers, {np.median(counts):.0f} tokens each "
        f"(median), {sum(few.values())} with fewer than {MIN_EXPERT_TOKENS}"
    ]
    if any(few.values()):
        places = [f"{path} {n}" for path, n in few.items() if n]
        shown = ", ".join(places[:_MAX_PLACES]) + (", ..." if len(places) > _MAX_PLACES else "")
        lines.append(
            f"            too few in {shown}; measure more --tokens, or other kinds of text "
            "(--recipe)"
        )
    return lines


def _describe_recipe(recipe: dict[str, Any]) -> str:
    """Describe one kind of text that a prior was measured on, in one line."""
    name = recipe.get("recipe", "?")
    file = f" {recipe['file']}" if "file" in recipe else ""
    return (
        f"{name}{file}, weight {recipe.get('weight', 1)}: "
        f"{recipe.get('tokens', 0)} tokens in {recipe.get('sequences', 0)} sequences"
    )


def _stability_table(prior: GlobalPrior, measures: Stability) -> list[str]:
    """Return the lines of a table with one row per layer and one column per measure."""
    paths = sorted(next(iter(prior.scores.values())), key=layer_order)
    rows = [[measure.get(path, float("nan")) for measure in measures.values()] for path in paths]
    width = max(map(len, paths))
    table = [f"{'':{width}}" + "".join(f"{name:>15}" for name in measures)]
    for path, row in zip([*paths, "mean"], [*rows, np.mean(rows, axis=0)], strict=True):
        table.append(f"{path:{width}}" + "".join(f"{value:15.3f}" for value in row))
    return table


def stability_lines(stability: dict[str, Stability]) -> list[str]:
    """Return progress lines, one per measure: its mean, and each layer's value in hundredths."""
    return [
        f"{statistic:10} {name:12} {np.mean([*measure.values()]):.3f}  by layer "
        + " ".join(f"{100 * value:3.0f}" for value in measure.values())
        for statistic, measures in stability.items()
        for name, measure in measures.items()
    ]


def draw(prior: GlobalPrior, file: Path) -> None:
    """Draw a prior's scores by layer and neuron rank into a PNG.

    Every layer is a row. Its neurons are sorted by score, with the most important on the left. The
    color is the score divided by the largest score of the layer.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = new_figure(7, 1 + 2.6 * len(prior.scores))
    from matplotlib.colors import LogNorm

    panels = figure.subplots(len(prior.scores), squeeze=False)[:, 0]
    for panel, (statistic, scores) in zip(panels, prior.scores.items(), strict=True):
        rows = [_sorted_ratios(scores[path]) for path in sorted(scores, key=layer_order)]
        image = panel.imshow(
            np.maximum(rows, 1e-6),
            aspect="auto",
            extent=(0, 1, len(rows) - 0.5, -0.5),
            interpolation="nearest",
            norm=LogNorm(_MIN_RATIO, 1),
        )
        panel.set(title=statistic, ylabel="layer", xlabel="neuron rank / number of neurons")
        figure.colorbar(image, ax=panel, label="score / largest score of the layer")
    figure.suptitle(
        f"Prior of {prior.about.get('model', '?')}: {prior.about.get('tokens', '?')} tokens"
    )
    save_figure(figure, file)


def _sorted_ratios(scores: np.ndarray) -> np.ndarray:
    """Sort a layer's scores (..., m), divide by the largest, and sample `_COLUMNS` of them.

    For a stack, the result is the mean over experts.
    """
    largest = np.maximum(scores.max(-1, keepdims=True), np.finfo(np.float32).tiny)
    ratios = (np.sort(scores, axis=-1)[..., ::-1] / largest).reshape(-1, scores.shape[-1]).mean(0)
    sampled: np.ndarray = np.interp(
        np.linspace(0, 1, _COLUMNS), np.linspace(0, 1, len(ratios)), ratios
    )
    return sampled


def _curve_lines(record: dict[str, Any]) -> list[str]:
    """Describe one record of a curve; see `prior.curves`."""
    curve = Curve.parse(record)
    points = ", ".join(
        f"{kl:.3f}{f' ± {error:.3f}' if error else ''} at {share:g}"
        for share, kl, error in zip(curve.shares, curve.kl, curve.standard_error, strict=True)
    )
    weights = record["conditions"].get("weights", "?")
    return [
        f"KL by density    {points}",
        f"            nats per token, {record.get('tokens', '?')} tokens written by the model, "
        f"{weights} weights",
    ]
