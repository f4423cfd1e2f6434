"""A fixed protocol that measures a machine in minutes, for the table of machines in the README.

Three models of published sizes with random weights, and a real one, decode dense and by default. On
a GPU, weights have 4 bits; on a CPU, which multiplies floats faster, they are float32. Nothing in
the result identifies a person or a single machine.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glass_mlx.config import DEFAULT_MAX_KL, Setting
from glass_mlx.latency.measured_model import fix_densities, load_model, load_prior, model_title
from glass_mlx.latency.timing import Settings, measure, summarize, time_run
from glass_mlx.memory import usable_memory
from glass_mlx.models import default_down_policy, named_arrays
from glass_mlx.reporting.machine import (
    busy_warning,
    describe_machine,
    describe_model,
    describe_power,
    made_with,
    power_warning,
    slowdown_warning,
    spread_warning,
)
from glass_mlx.session import Session

import mlx.core as mx
import mlx_lm

FORMAT = "glass-mlx machine 1"

# Small and large models that people run. None is the real one.
SHAPES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")

_PROMPT_TOKENS, _GENERATION_TOKENS = 64, 256

# The number of rounds that are timed, by how much time there is.
_MIN_REPETITIONS, _MAX_REPETITIONS = 2, 8

# Fewer tokens than this say little, because the first slices cost time.
_MIN_TOKENS = 64
_TRIAL_TOKENS = 8

# The part of the time that generations may take; the rest goes to loading and calibration.
_SHARE = 0.7


def measure_machine(
    model: str | None, minutes: float, save: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Run the protocol.

    Args:
        model: the real model, or None for the built-in one.
        minutes: about the time that everything may take. Models get an equal part of what is left,
            and generate fewer tokens on a slow machine, or are left out.
        save: called after every model with the contents so far, which an interruption leaves.

    Returns:
        The contents of a file for `docs/data/machines`.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if it cannot be used.
    """
    start, power = time.perf_counter(), describe_power()
    about = made_with() | {
        "format": FORMAT,
        "machine": describe_machine() | describe_model(),
        "before": power,
    }
    jobs = [_arguments(model, None), *(_arguments(None, shape) for shape in SHAPES)]
    results: list[dict[str, Any]] = []
    warnings = [*filter(None, [busy_warning()])]
    # The largest come first: one that does not fit leaves its time to the others.
    for number in reversed(range(len(jobs))):
        title, left = model_title(jobs[number]), 60 * minutes - (time.perf_counter() - start)
        print(f"{title} ...", file=sys.stderr)
        try:
            result = _measure_model(jobs[number], left / (number + 1), warnings)
        except RuntimeError as error:  # MLX's, where the GPU has too little memory for a model
            result = {"left_out": f"it did not run: {error}"}
        results.insert(0, {"model": title} | result)
        mx.clear_cache()
        after = describe_power()
        found = about | {
            "after": after,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.perf_counter() - start, 1),
            "warnings": [*warnings, *filter(None, [power_warning(power, after)])],
            "results": results,
        }
        save(found)
    return found


def _arguments(model: str | None, shape: str | None) -> Namespace:
    """Return the flags of a model, as `measured_model` has them."""
    is_gpu = mx.default_device() == mx.gpu
    return Namespace(
        model=model,
        shape=shape,
        layers=None,
        bits=4 if is_gpu and shape else None,
        group_size=None,
        mode=None,
        dtype=None if is_gpu else "float32",
        dequantize=not is_gpu,
        down_policy=default_down_policy(),
    )


def _measure_model(args: Namespace, seconds: float, warnings: list[str]) -> dict[str, Any]:
    """Time one model, or say why it is left out.

    Args:
        args: its flags.
        seconds: the time that it may take.
        warnings: receives what makes the figures doubtful.
    """
    lazy, _ = load_model(args, lazy=True)
    size = sum(array.nbytes for _, array in named_arrays(lazy))
    if 2 * size > usable_memory():
        return {"left_out": f"{size / 1e9:.1f} GB and slices need too much memory"}
    del lazy
    started = time.perf_counter()
    model, tokenizer = load_model(args)
    session, kept = Session.of(model), [Setting(max_kl=DEFAULT_MAX_KL)]
    prior = load_prior(model, tokenizer, args, kept)
    tokenizer.eos_token_ids = []
    if args.shape:
        kept = fix_densities(kept, session, tokenizer, prior)
    trial = _time_step(session, tokenizer)
    left = seconds - (time.perf_counter() - started)
    # Both methods run in every round, and the first one is to warm up.
    per_round = _SHARE * left / trial / 2
    tokens = min(_GENERATION_TOKENS, int(per_round / (_MIN_REPETITIONS + 1)))
    if tokens < _MIN_TOKENS:
        return {"left_out": f"too slow for the time ({1 / trial:.1f} tokens/s)"}
    settings = Settings(
        shares=kept,
        methods=["default"],
        prompt_tokens=[_PROMPT_TOKENS],
        generation_tokens=tokens,
        repetitions=min(_MAX_REPETITIONS, int(per_round / tokens) - 1),
        seed=0,
        down_policy=args.down_policy,
    )
    measured = measure(session, tokenizer, prior, settings, _never)
    dense, sliced = measured.values()
    report = sliced[0].report
    assert report is not None
    speedups = [a.total_tps / b.total_tps for a, b in zip(sliced, dense, strict=True)]
    slowdown = slowdown_warning([run.decode_tps for run in dense])
    for warning in filter(None, (slowdown, spread_warning(speedups))):
        warnings.append(f"{model_title(args)}: {warning}")
    return {
        "size_gb": size / 1e9,
        "weights": session.weight_format,
        "rows": summarize(session.weight_bytes, measured, {}),
        "speedups": speedups,
        "same_text": [a.tokens == b.tokens for a, b in zip(sliced, dense, strict=True)],
        "selections": report.selections,
        "drafts": report.drafts,
        "checked_tokens": report.checked_tokens,
    }


def _never() -> Any:
    raise AssertionError("no method of the protocol releases weights")


def _time_step(session: Session, tokenizer: Any) -> float:
    """Return the seconds that a dense token takes."""
    stream: Callable[..., Any] = mlx_lm.stream_generate
    prompt = [*range(_PROMPT_TOKENS)]
    time_run(stream(session.model, tokenizer, prompt, max_tokens=2))  # to compile
    return 1 / time_run(stream(session.model, tokenizer, prompt, _TRIAL_TOKENS)).decode_tps


def is_submission(contents: Any) -> bool:
    """Return whether the contents of a JSON file are those of a measured machine."""
    return isinstance(contents, dict) and contents.get("format") == FORMAT


def submission_advice(file: Path) -> str:
    """Return how to contribute a file."""
    return (
        f"Wrote {file}. Look at it, and add it to docs/data/machines/ in a pull request, or paste "
        "it into an issue (template: Speed on your machine)."
    )
