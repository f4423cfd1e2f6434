"""Time generations, dense and sliced, alternating in one process."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from glass_mlx.calibration.first_use import make_selector
from glass_mlx.config import GlassConfig, Setting
from glass_mlx.generation_report import Report
from glass_mlx.models import Routing, membership
from glass_mlx.models.linear import outputs
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.selection import Selection
from glass_mlx.session import Session
from glass_mlx.slicing import mean_compensation
from glass_mlx.statistics import LocalStatistics
from glass_mlx.streaming import stream_generate

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

DENSE = "dense"

# Options of `stream_generate` by method; None for mlx-lm itself.
_SELECT_ONCE = {"warmup": 1, "refresh": 0, "dense_every": 0}
METHODS: dict[str, dict[str, Any] | None] = {
    DENSE: None,
    "griffin": _SELECT_ONCE | {"prior_weight": 0.0, "prior": False},
    "glass": _SELECT_ONCE,
    "released": _SELECT_ONCE,
    "default": {},
}

# The share of the neurons that changes in the renewal whose time is measured.
_CHANGED_SHARE = 0.1

# Prompts are random tokens below this id.
_MAX_TOKEN_ID = 10_000


@dataclass(frozen=True)
class Settings:
    """What to time.

    Attributes:
        shares: how much of the model the sliced methods keep.
        methods: the sliced methods, keys of `METHODS`.
        prompt_tokens: lengths of the prompts.
        generation_tokens: number of generated tokens.
        repetitions: how often each generation is timed.
        seed: the seed of the random prompts.
        down_policy: how quantized down projections are sliced.
    """

    shares: list[Setting]
    methods: list[str]
    prompt_tokens: list[int]
    generation_tokens: int
    repetitions: int
    seed: int
    down_policy: str


@dataclass(frozen=True)
class Run:
    """One timed generation.

    Attributes:
        tokens: the ids of the tokens.
        times: the time of each token, in seconds from the start.
        prefill_peak: the most bytes in use up to the first token.
        decode_peak: the most bytes in use after the first token.
        held: bytes in use at the last token.
        report: the report on the slicing, or None without slicing.
    """

    tokens: list[int]
    times: list[float]
    prefill_peak: int
    decode_peak: int
    held: int
    report: Report | None

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the second token, which a first selection delays."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])

    @property
    def total_tps(self) -> float:
        """Tokens per second after the first token, with selecting and slicing."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


# A method, how much it keeps, and a number of prompt tokens.
Mode = tuple[str, Setting, int]

_WHOLE = Setting(density=1.0, vocabulary=1.0)


def list_modes(settings: Settings) -> list[Mode]:
    """List everything that is compared. Each prompt length starts with dense mlx-lm."""
    return [
        mode
        for length in settings.prompt_tokens
        for mode in [
            (DENSE, _WHOLE, length),
            *((name, kept, length) for kept in settings.shares for name in settings.methods),
        ]
    ]


def time_run(responses: Iterable[Any]) -> Run:
    """Run a generation and time it."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    tokens: list[int] = []
    times: list[float] = []
    report, prefill_peak, held = None, 0, 0
    for response in responses:
        report = getattr(response, "glass", None)
        times.append(time.perf_counter() - start)
        tokens.append(response.token)
        held = mx.get_active_memory()
        if len(times) == 1:
            prefill_peak = mx.get_peak_memory()
            mx.reset_peak_memory()
    return Run(tokens, times, prefill_peak, mx.get_peak_memory(), held, report)


def measure(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    settings: Settings,
    reload: Callable[[], nn.Module],
) -> dict[Mode, list[Run]]:
    """Time every mode repeatedly, after one round to warm up.

    Args:
        session: the model's session.
        tokenizer: its tokenizer, without an end-of-sequence token.
        prior: its prior, or None if none is needed.
        settings: what to time.
        reload: loads the model once more; see `stream_generate`.

    Returns:
        The runs of each mode.
    """
    generator = np.random.default_rng(settings.seed)
    vocabulary = min(tokenizer.vocab_size, _MAX_TOKEN_ID)
    runs: dict[Mode, list[Run]] = {mode: [] for mode in list_modes(settings)}
    rounds = settings.repetitions + 1
    with tqdm(total=len(runs) * rounds, unit="run", file=sys.stderr) as bar:
        for repetition in range(rounds):
            prompts = {
                n: generator.integers(0, vocabulary, n).tolist() for n in settings.prompt_tokens
            }
            # Every other round runs backwards, so that no run always follows the same other run.
            order = list(runs.items())[:: -1 if repetition % 2 else 1]
            for (method, kept, length), mode_runs in order:
                common = (tokenizer, prompts[length], settings.generation_tokens)
                bar.set_description(method)
                if (changes := METHODS[method]) is None:
                    run = time_run(mlx_lm.stream_generate(session.model, *common))
                else:
                    options: dict[str, Any] = kept._asdict() | {"prior": prior} | changes
                    options["down_policy"] = settings.down_policy
                    options["reload"] = reload if method == "released" else None
                    run = time_run(stream_generate(session, *common, **options))
                    mx.eval(session.model.parameters())  # loads the released weights
                if repetition:
                    mode_runs.append(run)
                bar.update()
    return runs


def time_slicing(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    kept: Setting,
    down_policy: str,
) -> tuple[float, float]:
    """Return the seconds for a first selection and its slices, and for a renewal of a tenth."""
    generator = np.random.default_rng(0)
    config = GlassConfig(**kept._asdict(), down_policy=down_policy)
    selector = make_selector(session, tokenizer, prior, config)
    local = _random_statistics(session, generator)
    firsts, renewals = [], []
    for _ in range(4):
        unsliced = session.without_room(selector)
        sliced, start = session.sliced_model(down_policy, unsliced=unsliced), time.perf_counter()
        shortlister = selector.shortlister(local.vocabulary)
        selection = selector.select(local)
        shortlist = None if shortlister is None else shortlister.choose([])
        sliced.update(selection, mean_compensation(local))
        sliced.slice_head(shortlist)
        firsts.append(time.perf_counter() - start)

        start = time.perf_counter()
        selector.select(local)
        shortlist = None if shortlister is None else shortlister.choose([])
        selecting = time.perf_counter() - start
        changed = _change_neurons(selection, generator)
        start = time.perf_counter()
        sliced.update(changed, mean_compensation(local))
        sliced.slice_head(shortlist)
        renewals.append(selecting + time.perf_counter() - start)
    return median(firsts[1:]), median(renewals[1:])


def _random_statistics(session: Session, generator: np.random.Generator) -> LocalStatistics:
    """Return the statistics of random hidden vectors, and outputs of zero."""
    local = session.empty_statistics()
    for part in (local.prompt, local.text):
        for ffn in session.ffns:
            hidden, routing = mx.array(generator.normal(size=(16, ffn.width))), None
            if ffn.experts is not None:
                experts = mx.array(generator.integers(0, ffn.experts, 16))
                routing = Routing(experts, mx.arange(16), 16)
            part.update(ffn.path, hidden, routing=routing)
        mx.eval(part.sums)
    for ffn in session.ffns:
        if ffn.experts is not None:
            continue
        local.text.update_outputs(ffn.path, mx.zeros((1, 16, outputs(ffn.contract[1]))))
    mx.eval(local.text.outputs)
    return local


def _change_neurons(selection: Selection, generator: np.random.Generator) -> Selection:
    """Replace some neurons of a selection with random others."""
    changed = {}
    for path, kept in selection.indices.items():
        width, k = selection.widths[path], kept.shape[-1]
        count = min(round(_CHANGED_SHARE * k), width - k)
        # Kept neurons come first in a random order, the others after them.
        is_kept = membership(kept, width)
        order = np.argsort(generator.random(is_kept.shape) - is_kept, axis=-1)
        chosen = order[..., count : k + count]
        changed[path] = np.sort(chosen, axis=-1).astype(np.int32)
    return Selection(changed, selection.widths)


def break_even(dense: list[Run], runs: list[Run]) -> int | None:
    """Return the number of the token from which sliced runs stay ahead of dense ones, or None."""
    sliced_times, dense_times = (
        np.median([run.times for run in group], axis=0) for group in (runs, dense)
    )
    behind = np.flatnonzero(sliced_times >= dense_times)
    tokens = int(behind[-1]) + 2 if len(behind) else 1
    return tokens if tokens <= len(sliced_times) else None


def summarize(
    dense_bytes: int,
    runs: dict[Mode, list[Run]],
    slicing_times: dict[Setting, tuple[float, float]],
) -> list[dict[str, Any]]:
    """Average the runs of each mode, and compare them with dense runs on the same prompts.

    Args:
        dense_bytes: bytes of weights that the dense model reads per token.
        runs: the runs of each mode.
        slicing_times: the results of `time_slicing`.
    """
    rows = []
    for (method, kept, length), mode_runs in runs.items():
        dense = runs[DENSE, _WHOLE, length]
        report = mode_runs[0].report
        times = slicing_times.get(kept, (0.0, 0.0)) if report else (0.0, 0.0)
        rows.append(
            {"method": method, "prompt_tokens": length}
            | kept._asdict()
            | _speed_figures(mode_runs, dense, length, dense_bytes)
            | _cost_figures(mode_runs, dense, times)
        )
    return rows


def _speed_figures(
    runs: list[Run], dense: list[Run], prompt_tokens: int, dense_bytes: int
) -> dict[str, Any]:
    report = runs[0].report
    tokens = len(runs[0].times)
    read = report.bytes_per_token(tokens) if report else dense_bytes
    speeds = [run.decode_tps for run in runs]
    total = mean(run.total_tps for run in runs)
    # With renewals, the speed includes the time for selecting and slicing.
    is_renewed = report is not None and report.selections > 1
    speed = total if is_renewed else mean(speeds)
    speedup = speed / mean(run.decode_tps for run in dense)
    ceiling = dense_bytes / read
    # The first token is computed in prefill.
    read_share = (report.read_bytes / dense_bytes - 1) / (tokens - 1) if report else 1.0
    run_ceiling = 1 / read_share
    run_speedup = total / mean(run.total_tps for run in dense)
    first_token, dense_first_token = (
        median(run.times[0] for run in group) for group in (runs, dense)
    )
    return {
        "density_got": report.density_got if report else 1.0,
        "vocabulary_got": report.vocabulary_got if report else 1.0,
        "generation_tokens": tokens,
        "repetitions": len(runs),
        "first_token_s": first_token,
        "second_token_s": median(r.times[1] - r.times[0] for r in runs),
        "prefill_tps": prompt_tokens / first_token,
        "prefill_ratio": first_token / dense_first_token,
        "decode_tps": mean(speeds),
        "decode_sd": stdev(speeds),
        "total_tps": total,
        "speedup": speedup,
        "ceiling": ceiling,
        "ceiling_ratio": speedup / ceiling,
        "run_ceiling": run_ceiling,
        "run_speedup": run_speedup,
        "run_ceiling_ratio": run_speedup / run_ceiling,
        "bytes_per_token": read,
        "gb_per_second": read * mean(speeds) / 1e9,
    }


def _cost_figures(
    runs: list[Run], dense: list[Run], slicing_times: tuple[float, float]
) -> dict[str, Any]:
    report = runs[0].report
    dense_tps = mean(run.decode_tps for run in dense)
    first, renewal = slicing_times
    return {
        "select_s": report.select_time if report else 0.0,
        "slice_s": report.slice_time if report else 0.0,
        "first_slicing_steps": first * dense_tps,
        "renewal_steps": renewal * dense_tps,
        "break_even": break_even(dense, runs) if report else None,
        "prefill_peak_gb": max(run.prefill_peak for run in runs) / 1e9,
        "decode_peak_gb": max(run.decode_peak for run in runs) / 1e9,
        "held_gb": runs[-1].held / 1e9,
    }
