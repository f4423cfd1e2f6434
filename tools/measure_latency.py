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

from glass_mlx import GlobalPrior, Report, load, resolve_prior, stream_generate
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
    "refresh": "refresh",
    "prefill_tps": "prefill t/s",
    "select_ms": "select ms",
    "slice_ms": "slice ms",
    "reread_ms": "reread ms",
    "total_tps": "total t/s",
    "decode_tps": "decode t/s",
    "decode_sd": "± sd",
    "megabytes": "MB/token",
    "speedup": "speed-up",
    "ceiling": "ceiling",
    "ceiling_ratio": "ratio",
}


@dataclass(frozen=True)
class Run:
    """What one generation took.

    Attributes:
        prefill_tps: prompt tokens a second.
        decode_tps: tokens a second after the second token, which slicing once does not delay.
        total_tps: tokens a second after the first, with all that comes in between.
        glass: the report on the slicing, if there was any.
    """

    prefill_tps: float
    decode_tps: float
    total_tps: float
    glass: Report | None

    def milliseconds(self, what: str) -> float:
        """A time in the report, zero without one."""
        return 1e3 * getattr(self.glass, what, 0.0)


# Density, and after how many tokens the selection is renewed. (1, 0) is dense mlx-lm.
Mode = tuple[float, int]
DENSE: Mode = (1.0, 0)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    parser.add_argument("--density", type=float, nargs="+", default=[0.5])
    parser.add_argument(
        "--refresh",
        type=int,
        nargs="+",
        default=[0],
        help="renew the selection every so many tokens, after the usual warm-up; 0 for one "
        "selection after the prompt (%(default)s)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--generation-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", type=Path, help="append one JSON line a density to this file")
    add_load_arguments(parser)
    return parser


def time_run(responses: Iterable[Any]) -> Run:
    """Run a generation and time it."""
    events = [(time.perf_counter(), response) for response in responses]
    (first, _), (second, _), *_, (end, last) = events
    return Run(
        last.prompt_tps,
        (len(events) - 2) / (end - second),
        (len(events) - 1) / (end - first),
        getattr(last, "glass", None),
    )


def measure(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | bool,
    args: argparse.Namespace,
) -> dict[Mode, list[Run]]:
    """Time every mode in turn, repeatedly, after one round to warm up."""
    generator = np.random.default_rng(args.seed)
    modes = [DENSE, *((density, refresh) for density in args.density for refresh in args.refresh)]
    runs: dict[Mode, list[Run]] = {mode: [] for mode in modes}
    for repetition in range(args.repetitions + 1):
        prompt = generator.integers(0, tokenizer.vocab_size, args.prompt_tokens).tolist()
        for (density, refresh), done in runs.items():
            common = (model, tokenizer, prompt, args.generation_tokens)
            if (density, refresh) == DENSE:
                run = time_run(mlx_lm.stream_generate(*common))
            else:
                options = {"density": density, "prior": prior, "refresh": refresh}
                options |= {} if refresh else {"warmup": 1}
                run = time_run(stream_generate(*common, **options))
            if repetition:
                done.append(run)
            progress = f"repetition {repetition}/{args.repetitions}, density {density:g}"
            print(f"\r{progress}: {run.total_tps:.1f} tokens/s  ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return runs


def summarise(runs: dict[Mode, list[Run]], dense_bytes: int) -> list[dict[str, float]]:
    """Average the runs of each mode and compare them with the dense ones."""
    dense = statistics.mean(run.decode_tps for run in runs[DENSE])
    rows = []
    for (density, refresh), done in runs.items():
        decode = statistics.mean(run.decode_tps for run in done)
        glass = done[0].glass
        weight_bytes = glass.sliced_bytes if glass else dense_bytes
        rows.append(
            {
                "density": density,
                "density_got": glass.density_got if glass else 1.0,
                "refresh": refresh,
                "prefill_tps": statistics.mean(run.prefill_tps for run in done),
                "select_ms": statistics.mean(run.milliseconds("select_time") for run in done),
                "slice_ms": statistics.mean(run.milliseconds("slice_time") for run in done),
                "reread_ms": statistics.mean(run.milliseconds("reread_time") for run in done),
                "total_tps": statistics.mean(run.total_tps for run in done),
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
