"""Measure what slicing a model costs, and put it into a prior in place of earlier curves.

On a CPU, MLX's quantized products are slow. This script slices the quantized weights, and computes
with the same values as floats. On other devices `glass-mlx generate` measures the same by itself at
the first use of a model.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from glass_mlx import GlassConfig, GlobalPrior, Session, load
from glass_mlx.arguments import add_model_argument
from glass_mlx.calibration.curves import CurveMeasurement, CurveSettings
from glass_mlx.errors import exit_on_error
from glass_mlx.models import DOWN_POLICIES, with_modules
from glass_mlx.models.down import NeuronMajorLinear
from glass_mlx.models.linear import is_linear
from glass_mlx.models.precision import dequantize
from glass_mlx.slicing import SlicedModel

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--prior", type=Path, required=True, help="The model's prior.")
    parser.add_argument("--output", type=Path, required=True, help="The prior with the curves.")
    parser.add_argument(
        "--down-policy",
        choices=DOWN_POLICIES,
        nargs="+",
        default=[],
        help="Measure the quantized model with these policies.",
    )
    parser.add_argument(
        "--floats",
        action="store_true",
        help="Measure the model as floats, as --dequantize loads it.",
    )
    parser.add_argument("--texts", type=int, default=CurveSettings.texts, help="(%(default)s)")
    return parser


class FloatSlices:
    """The slices of a quantized model, as layers of floats of the same values.

    Args:
        sliced: the slices.
        model: the dense model as floats.
    """

    def __init__(self, sliced: SlicedModel, model: nn.Module) -> None:
        self._sliced, self._dense = sliced, model
        self.update = sliced.update

    @property
    def selection(self) -> Any:
        """The neurons in the slices."""
        return self._sliced.selection

    @property
    def model(self) -> nn.Module:
        """The sliced model after the latest update."""
        parts = {path: parts for path, (_, parts) in self._sliced.slices.items()}
        layers = {
            path: {name: _as_floats(layer) for name, layer in layers.items()}
            for path, layers in parts.items()
        }
        return with_modules(self._dense, layers)


def _as_floats(layer: nn.Module) -> nn.Module:
    """Return a layer of floats that computes the same as a slice."""
    if isinstance(layer, NeuronMajorLinear):
        options = (layer.group_size, layer.bits, layer.mode)
        weight = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), *options).T
        floats = nn.Linear(1, 1, bias=False)
        floats.weight = weight
        if "bias" in layer:
            floats.bias = layer.bias
        return floats
    if not is_linear(layer):
        raise ValueError("only requantize and neuron-major are measured here")
    holder = nn.Sequential(layer)
    dequantize(holder)
    return holder.layers[0]


def float_session(quantized: Session, model: nn.Module) -> Session:
    """Return a session of a model of floats, whose slices are those of the quantized model."""
    session = Session(model)
    make_slices: Callable[..., Any] = quantized.sliced_model
    overrides = {
        "sliced_model": lambda *args, **options: FloatSlices(make_slices(*args, **options), model),
        "conditions": quantized.conditions,
    }
    for name, function in overrides.items():
        setattr(session, name, function)
    return session


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("add_curves"):
        args = setup_arg_parser().parse_args()
        model, tokenizer = load(args.model, dtype="float32")
        floats, _ = load(args.model, dtype="float32", dequantize=True)
        prior, settings = GlobalPrior.load(args.prior), CurveSettings(texts=args.texts)
        runs = [(Session(floats), GlassConfig())] * args.floats
        runs += [
            (float_session(Session(model), floats), GlassConfig(down_policy=policy))
            for policy in args.down_policy
        ]
        with tqdm(total=settings.texts * len(runs), unit="read", file=sys.stderr) as bar:
            for session, config in runs:
                measurement = CurveMeasurement(session, tokenizer, settings, progress=bar.update)
                prior = with_curves(prior, measurement.measure(prior, config))
        prior.save(args.output)


def with_curves(prior: GlobalPrior, record: dict[str, Any]) -> GlobalPrior:
    """Return a prior with the curves of a measurement, in place of those of the same conditions."""
    others = [
        other
        for other in prior.about.get("curves", [])
        if other["conditions"] != record["conditions"]
    ]
    return replace(prior, about=prior.about | {"curves": [*others, record]})


if __name__ == "__main__":
    main()
