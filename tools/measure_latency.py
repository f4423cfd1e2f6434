"""Measure how fast a model decodes, dense and sliced, alternating in one process.

For each density and prompt length one row a method: mlx-lm itself, GRIFFIN's method (one selection
by the prompt alone) and GLASS with one selection in our engine, the same with the dense weights
released, and the default, which reads over what was written and renews the selection. The ceiling
is what the bytes allow: the weights that dense decoding reads for a token, over those that sliced
decoding reads.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glass_mlx import GlobalPrior, Report, load, resolve_prior, stream_generate
from glass_mlx.checkpoints import DEFAULT_MODEL, DTYPES, add_load_arguments, advice, model_name
from glass_mlx.command import ending
from glass_mlx.files import replacing
from glass_mlx.lookup import NoPriorError
from glass_mlx.models import default_down_policy, find_ffns, weight_bytes
from glass_mlx.models.linear import outputs
from glass_mlx.provenance import made_with
from glass_mlx.selection import Selection
from glass_mlx.slicing import DEFAULT_REFRESH, DEFAULT_WARMUP, Evidence, Slicer, Slicing
from latency_report import plot, table
from machine import busy, machine, throttled
from shapes import SHAPES, numbers_tokenizer, random_model, random_prior

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

_ONCE = {"warmup": 1, "refresh": 0}
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "griffin": _ONCE | {"mix": 0.0, "prior": False},
    "glass": _ONCE,
    "released": _ONCE,
    "default": {"warmup": DEFAULT_WARMUP, "refresh": DEFAULT_REFRESH},
}

# The share of the neurons that a renewal changes, where its time is measured.
_CHANGED = 0.1


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is measured; see `load_model`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    source.add_argument(
        "--shape", choices=SHAPES, help="a model of these sizes with random weights instead"
    )
    parser.add_argument("--down-policy", default=default_down_policy(), help="(%(default)s)")
    group = parser.add_argument_group("random weights")
    group.add_argument("--bits", type=int, help="quantize to so many bits. Default: floats")
    group.add_argument("--group-size", type=int, default=64, help="(%(default)s)")
    group.add_argument("--mode", default="affine", help="of quantization (%(default)s)")
    add_load_arguments(parser)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[name for name in METHODS if name != "dense"],
        default=["griffin", "glass", "default"],
        help="what to compare dense mlx-lm with (%(default)s)",
    )
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--generation-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", type=Path, help="write one JSON line a row to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--plot", type=Path, help="draw tokens/s and ceiling against density")
    return parser


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        times: when each token came, seconds from the start.
        prefill_peak: most bytes in use up to the first token.
        decode_peak: most bytes in use after it.
        held: bytes in use at the last token.
        report: on the slicing, if there was any.
    """

    times: list[float]
    prefill_peak: int
    decode_peak: int
    held: int
    report: Report | None

    @property
    def decode_tps(self) -> float:
        """Tokens a second after the second token, which a first selection delays."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])

    @property
    def total_tps(self) -> float:
        """Tokens a second after the first, with all that comes in between."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def time_run(responses: Iterable[Any]) -> Run:
    """Run a generation and time it."""
    mx.reset_peak_memory()
    start, times = time.perf_counter(), []
    report = None
    for response in responses:
        report = getattr(response, "glass", None)
        times.append(time.perf_counter() - start)
        held = mx.get_active_memory()
        if len(times) == 1:
            prefill_peak = mx.get_peak_memory()
            mx.reset_peak_memory()
    return Run(times, prefill_peak, mx.get_peak_memory(), held, report)


# What is compared: a method, a density and a number of prompt tokens.
Mode = tuple[str, float, int]


def modes(args: argparse.Namespace) -> list[Mode]:
    """All that is compared, each prompt length beginning with dense mlx-lm."""
    return [
        mode
        for length in args.prompt_tokens
        for mode in [
            ("dense", 1.0, length),
            *((method, density, length) for density in args.density for method in args.methods),
        ]
    ]


def measure(
    model: nn.Module, tokenizer: TokenizerWrapper, prior: GlobalPrior, args: argparse.Namespace
) -> dict[Mode, list[Run]]:
    """Time every mode in turn, repeatedly, after one round to warm up."""

    def reload() -> nn.Module:
        return load_model(args, lazy=True)[0]

    generator = np.random.default_rng(args.seed)
    vocabulary = min(tokenizer.vocab_size, 10_000)
    runs: dict[Mode, list[Run]] = {mode: [] for mode in modes(args)}
    with tqdm(total=len(runs) * (args.repetitions + 1), unit="run", file=sys.stderr) as bar:
        for repetition in range(args.repetitions + 1):
            prompts = {n: generator.integers(0, vocabulary, n).tolist() for n in args.prompt_tokens}
            # There and back, so that what a run leaves behind does not always meet the same one.
            order = list(runs.items())[:: -1 if repetition % 2 else 1]
            for (method, density, length), done in order:
                common = (model, tokenizer, prompts[length], args.generation_tokens)
                bar.set_description(f"{method} {density:g}")
                if (changes := METHODS[method]) is None:
                    run = time_run(mlx_lm.stream_generate(*common))
                else:
                    options = {"density": density, "prior": prior} | changes
                    options |= {"down_policy": args.down_policy}
                    options |= {"reload": reload} if method == "released" else {}
                    run = time_run(stream_generate(*common, **options))
                    mx.eval(model.parameters())  # what was released
                if repetition:
                    done.append(run)
                bar.update()
    return runs


def time_slicing(
    model: nn.Module, prior: GlobalPrior, density: float, policy: str
) -> tuple[float, float]:
    """Seconds of a first selection with its slices, and of a renewal that changes a tenth."""
    ffns, generator = find_ffns(model), np.random.default_rng(0)
    slicing = Slicing(density=density, prior=prior, down_policy=policy)
    evidence = Evidence.of(model)
    for part in (evidence.prompt, evidence.text):
        for ffn in ffns:
            part.update(ffn.path, mx.array(generator.normal(size=(1, 16, ffn.width))))
        mx.eval(part.sums)
    for ffn in ffns:  # which reading the text gives, too
        evidence.text.update_outputs(ffn.path, mx.zeros((1, 16, outputs(ffn.contract[1]))))
    mx.eval(evidence.text.outputs)
    firsts, renewals = [], []
    for _ in range(4):
        slicer, start = Slicer(model, policy), time.perf_counter()
        chosen = slicing.select(ffns, evidence)
        slicer(chosen, evidence.stand_ins())
        firsts.append(time.perf_counter() - start)
        start = time.perf_counter()
        slicing.select(ffns, evidence)
        selecting = time.perf_counter() - start
        changed = {}
        for path, kept in chosen.indices.items():
            others = np.setdiff1d(np.arange(chosen.widths[path]), kept)
            count = min(round(_CHANGED * len(kept)), len(others))
            gone = generator.choice(len(kept), count, replace=False)
            new = generator.choice(others, count, replace=False)
            changed[path] = np.sort([*np.delete(kept, gone), *new]).astype(np.int32)
        start = time.perf_counter()
        slicer(Selection(changed, chosen.widths), evidence.stand_ins())
        renewals.append(selecting + time.perf_counter() - start)
    return statistics.median(firsts[1:]), statistics.median(renewals[1:])


def break_even(dense: list[Run], runs: list[Run]) -> int | None:
    """From how many generated tokens on a run is done before the dense one, if it ever is."""
    ours, theirs = (np.median([run.times for run in group], axis=0) for group in (runs, dense))
    later = np.flatnonzero(ours >= theirs)
    done = int(later[-1]) + 2 if len(later) else 1
    return done if done <= len(ours) else None


def summarise(
    model: nn.Module,
    runs: dict[Mode, list[Run]],
    slicing: dict[float, tuple[float, float]],
) -> list[dict[str, Any]]:
    """Average the runs of each mode, and compare them with the dense ones of the same prompts."""
    rows, dense_bytes = [], weight_bytes(model)
    for (method, density, length), done in runs.items():
        dense = runs["dense", 1.0, length]
        speeds = [run.decode_tps for run in done]
        step = 1 / statistics.mean(run.decode_tps for run in dense)
        report = done[0].report
        read = report.sliced_bytes if report else dense_bytes
        # Where the selection is renewed, speed is what comes out with all that this takes.
        renewed = report is not None and report.selections > 1
        total = statistics.mean(run.total_tps for run in done)
        ours = total if renewed else statistics.mean(speeds)
        first, renewal = slicing.get(density, (0.0, 0.0)) if report else (0.0, 0.0)
        speedup, ceiling = ours * step, dense_bytes / read
        ttft = [statistics.median(run.times[0] for run in group) for group in (done, dense)]
        rows.append(
            {
                "method": method,
                "density": density,
                "density_got": report.density_got if report else 1.0,
                "prompt_tokens": length,
                "generation_tokens": len(done[0].times),
                "repetitions": len(done),
                "first_token_s": ttft[0],
                "second_token_s": statistics.median(r.times[1] - r.times[0] for r in done),
                "prefill_tps": length / ttft[0],
                "prefill_ratio": ttft[0] / ttft[1],
                "decode_tps": statistics.mean(speeds),
                "decode_sd": statistics.stdev(speeds),
                "total_tps": total,
                "speedup": speedup,
                "ceiling": ceiling,
                "ceiling_ratio": speedup / ceiling,
                "bytes_per_token": read,
                "gb_per_second": read * statistics.mean(speeds) / 1e9,
                "select_s": report.select_time if report else 0.0,
                "slice_s": report.slice_time if report else 0.0,
                "reread_s": report.reread_time if report else 0.0,
                "first_slicing_steps": first / step,
                "renewal_steps": renewal / step,
                "break_even": break_even(dense, done) if report else None,
                "prefill_peak_gb": max(run.prefill_peak for run in done) / 1e9,
                "decode_peak_gb": max(run.decode_peak for run in done) / 1e9,
                "held_gb": done[-1].held / 1e9,
            }
        )
    return rows


def load_model(args: argparse.Namespace, lazy: bool = False) -> tuple[nn.Module, TokenizerWrapper]:
    """The model, and its tokenizer that ends nothing."""
    if args.shape:
        dtype = args.dtype or DTYPES[0]
        model = random_model(args.shape, dtype, args.bits, args.group_size, args.mode, lazy)
        return model, numbers_tokenizer(SHAPES[args.shape][-2])
    model, tokenizer = load(args.model, lazy=lazy, dtype=args.dtype, dequantize=args.dequantize)
    tokenizer.eos_token_ids = []
    return model, tokenizer


def prior_of(model: nn.Module, args: argparse.Namespace) -> GlobalPrior:
    """The model's prior, or a random one: the time does not depend on which neurons are kept."""
    try:
        return random_prior(model) if args.shape else resolve_prior(model)
    except NoPriorError:
        return random_prior(model)


def run(args: argparse.Namespace) -> None:
    """Measure, and write what came out."""
    if args.repetitions < 2 or args.generation_tokens < 4 or min(args.prompt_tokens) < 2:
        raise ValueError("at least 2 repetitions, 4 generated and 2 prompt tokens are needed")
    warnings = [busy()]
    model, tokenizer = load_model(args)
    prior = prior_of(model, args)
    load_peak = mx.get_peak_memory()
    warnings.append(advice(model))
    runs = measure(model, tokenizer, prior, args)
    warnings += [
        throttled([r.decode_tps for r in done])
        for (name, *_), done in runs.items()
        if name == "dense"
    ]
    slicing = {d: time_slicing(model, prior, d, args.down_policy) for d in args.density if d < 1}
    rows = summarise(model, runs, slicing)
    weights = [array for _, array in tree_flatten(model.parameters())]
    quantized = "" if args.bits is None else f" {args.bits} bits"
    about = made_with() | {
        "model": f"{args.shape} (random){quantized}" if args.shape else model_name(args.model),
        "size_gb": sum(array.nbytes for array in weights) / 1e9,
        "load_peak_gb": load_peak / 1e9,
        "machine": machine(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "warnings": [warning for warning in warnings if warning],
    }
    text = table(about, rows)
    print(text)
    for warning in about["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text("".join(json.dumps(about | row) + "\n" for row in rows))
    if args.markdown:
        with replacing(args.markdown) as temporary:
            temporary.write_text(text + "\n")
    if args.plot:
        plot(about, rows, args.plot)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("measure_latency"):
        run(args)


if __name__ == "__main__":
    main()
