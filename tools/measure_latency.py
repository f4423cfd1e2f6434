"""Measure how fast a model decodes, dense and sliced, alternating in one process."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glass_mlx import GlobalPrior, load, resolve_prior, stream_generate
from glass_mlx.checkpoints import DEFAULT_MODEL, add_load_arguments
from glass_mlx.models import weight_bytes
from glass_mlx.provenance import made_with

import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

COLUMNS = {
    "density": "density",
    "density_got": "got",
    "prefill_tps": "prefill t/s",
    "select_ms": "select ms",
    "slice_ms": "slice ms",
    "decode_tps": "decode t/s",
    "decode_sd": "± sd",
    "megabytes": "MB/token",
    "speedup": "speed-up",
    "ceiling": "ceiling",
    "ceiling_ratio": "ratio",
}


@dataclass(frozen=True)
class Run:
    """What one generation took."""

    prefill_tps: float
    decode_tps: float
    select_time: float = 0.0
    slice_time: float = 0.0
    density_got: float = 1.0
    weight_bytes: int = 0


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    parser.add_argument("--density", type=float, nargs="+", default=[0.5])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--generation-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", type=Path, help="append one JSON line a density to this file")
    add_load_arguments(parser)
    return parser


def time_run(responses: Iterable[Any]) -> Run:
    """Run a generation and time the tokens after the second, which no slicing delays."""
    events = [(time.perf_counter(), response) for response in responses]
    decode_tps = (len(events) - 2) / (events[-1][0] - events[1][0])
    last = events[-1][1]
    glass = getattr(last, "glass", None)
    if glass is None:
        return Run(last.prompt_tps, decode_tps)
    return Run(
        last.prompt_tps,
        decode_tps,
        glass.select_time,
        glass.slice_time,
        glass.density_got,
        glass.sliced_bytes,
    )


def measure(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | bool,
    args: argparse.Namespace,
) -> dict[float, list[Run]]:
    """Time every density in turn, repeatedly, after one round to warm up; 1 is dense mlx-lm."""
    generator = np.random.default_rng(args.seed)
    runs: dict[float, list[Run]] = {density: [] for density in (1.0, *args.density)}
    for repetition in range(args.repetitions + 1):
        prompt = generator.integers(0, tokenizer.vocab_size, args.prompt_tokens).tolist()
        for density, done in runs.items():
            common = (model, tokenizer, prompt, args.generation_tokens)
            if density == 1.0:
                run = time_run(mlx_lm.stream_generate(*common))
            else:
                run = time_run(stream_generate(*common, density=density, prior=prior))
            if repetition:
                done.append(run)
            progress = f"repetition {repetition}/{args.repetitions}, density {density:g}"
            print(f"\r{progress}: {run.decode_tps:.1f} tokens/s  ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return runs


def summarise(runs: dict[float, list[Run]], dense_bytes: int) -> list[dict[str, float]]:
    """Average the runs of each density and compare them with the dense ones."""
    dense = statistics.mean(run.decode_tps for run in runs[1.0])
    rows = []
    for density, done in runs.items():
        decode = statistics.mean(run.decode_tps for run in done)
        weight_bytes = done[0].weight_bytes or dense_bytes
        rows.append(
            {
                "density": density,
                "density_got": done[0].density_got,
                "prefill_tps": statistics.mean(run.prefill_tps for run in done),
                "select_ms": 1e3 * statistics.mean(run.select_time for run in done),
                "slice_ms": 1e3 * statistics.mean(run.slice_time for run in done),
                "decode_tps": decode,
                "decode_sd": statistics.stdev(run.decode_tps for run in done),
                "megabytes": weight_bytes / 1e6,
                "speedup": decode / dense,
                "ceiling": dense_bytes / weight_bytes,
                "ceiling_ratio": decode / dense / (dense_bytes / weight_bytes),
            }
        )
    return rows


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    try:
        if args.repetitions < 2 or args.generation_tokens < 4:
            raise ValueError("at least 2 repetitions and 4 generated tokens are needed")
        model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
        tokenizer.eos_token_ids = []
        try:
            prior = resolve_prior(model)
        except ValueError:
            prior = False  # the time does not depend on which neurons are kept
        runs = measure(model, tokenizer, prior, args)
    except (ValueError, OSError) as error:
        print(f"measure_latency: error: {error}", file=sys.stderr)
        sys.exit(2)
    about = made_with() | {
        "model": args.model or DEFAULT_MODEL,
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
    }
    rows = summarise(runs, weight_bytes(model))
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + " ---: |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(f"{row[column]:.3g}" for column in COLUMNS) + " |")
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
