"""Measure KL by position over long texts and after long prompts, with speed and memory.

The dense model continues prompts by thousands of tokens; it may not end a text. Long prompts begin
with a document. Every setting is scored on these texts token by token, as in `glass-mlx fidelity`.
With --generate, the engine also generates as many tokens, dense and sliced, with a plain cache, one
of 8 bits and one that keeps a quarter of the tokens, for speed and memory. --json has a line for
each text and setting, and one for each generation, and a run that was interrupted continues.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glass_mlx import GlassConfig, GlobalPrior, Session, stream_generate
from glass_mlx.arguments import (
    add_load_arguments,
    add_model_argument,
    add_prior_argument,
    add_settings_arguments,
    check_minimums,
    make_settings,
)
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.chat_templates import encode
from glass_mlx.checkpoints.loading import model_name
from glass_mlx.config import DEFAULT_MAX_KL, Setting
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import Continuation, read_prompts
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.files import cache_folder, locked, write_text
from glass_mlx.latency.timing import time_run
from glass_mlx.reporting.machine import made_with
from glass_mlx.reporting.tables import markdown_table, write_rows
from glass_mlx.selection import Selector

import continuations
import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"

# KL is averaged over this many tokens for each point of the JSON lines.
_BIN = 32

Row = dict[str, Any]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    add_prior_argument(parser)
    add_settings_arguments(parser, f"a bound of {DEFAULT_MAX_KL}")
    parser.add_argument("--limit", type=int, default=2, help="Use the first LIMIT prompts.")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[0, 4000],
        help="Tokens of the document before each prompt (%(default)s).",
    )
    parser.add_argument(
        "--document", type=Path, default=DOCUMENT, help="A text file (%(default)s)."
    )
    parser.add_argument("--generate", action="store_true", help="Generate, too; see above.")
    parser.add_argument("--json", type=Path, required=True, help="One line per text and setting.")
    continuations.add_arguments(parser)
    parser.set_defaults(tokens=2000)
    add_load_arguments(parser)
    return parser


def make_prompt(
    tokenizer: TokenizerWrapper, question: str, document: str, tokens: int
) -> list[int]:
    """Return the ids of a question, with the first tokens of a document before it."""
    if not tokens:
        return encode(tokenizer, [{"role": "user", "content": question}])
    ids = tokenizer.encode(document, add_special_tokens=False)
    if len(ids) < tokens:
        raise ValueError(f"the document has {len(ids)} tokens, and not {tokens}; give a longer one")
    text = f"{tokenizer.decode(ids[:tokens])}\n\n{question}"
    return encode(tokenizer, [{"role": "user", "content": text}])


def write_long(
    session: Session, tokenizer: TokenizerWrapper, prompt: list[int], args: argparse.Namespace
) -> Continuation:
    """Have the dense model continue a prompt without an end, or read its text from the cache."""
    key = [made_with(), session.weight_format, prompt, args.tokens, args.temp, args.seed]
    digest = hashlib.sha256(json.dumps([*key, model_name(args.model)]).encode()).hexdigest()[:16]
    file = cache_folder() / "continuations" / f"long-{digest}.json"
    if file.is_file():
        return Continuation(**json.loads(file.read_text()))
    bias = dict.fromkeys(tokenizer.eos_token_ids, float("-inf"))
    mx.random.seed(args.seed)
    steps = generate_step(
        mx.array(prompt),
        session.model,
        max_tokens=args.tokens,
        sampler=make_sampler(args.temp),
        logits_processors=make_logits_processors(bias or None),
    )
    bar = tqdm(steps, total=args.tokens, desc="writing", unit="tok", file=sys.stderr, leave=False)
    text = Continuation(prompt, [int(token) for token, _ in bar])
    write_text(file, json.dumps(asdict(text)))
    return text


def score_text(reading: DenseReading, selector: Selector) -> Row:
    """Score a setting on a text, and return its row's figures."""
    scores = score(reading, selector)
    starts = range(0, reading.tokens, _BIN)
    return {
        "kl": float(scores.kl.mean()),
        "kl_p99": float(np.percentile(scores.kl, 99)),
        "kl_by_position": [float(scores.kl[n : n + _BIN].mean()) for n in starts],
        "bin": _BIN,
        "top1": float(scores.agrees.mean()),
        "run_share": float(scores.bytes.mean()),
        "dense_every": selector.config.dense_every,
    }


def caches(tokens: int) -> dict[str, Row]:
    """Return options of `generate_step` for each kind of cache.

    Args:
        tokens: the number of tokens that are read and generated.
    """
    return {
        "plain": {},
        "8 bits": {"kv_bits": 8, "quantized_kv_start": 0},
        "a quarter": {"max_kv_size": max(16, tokens // 4)},
    }


def time_generation(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    prompt: list[int],
    options: tuple[int, Setting | None, Row],
) -> Row:
    """Generate once, and return speed and memory.

    Args:
        session: the model's session.
        tokenizer: its tokenizer, without an end-of-sequence token.
        prior: its prior.
        prompt: the prompt.
        options: the number of tokens, the setting (None for dense), and options of the cache.
    """
    tokens, setting, cache = options
    if setting is None:
        run = time_run(mlx_lm.stream_generate(session.model, tokenizer, prompt, tokens, **cache))
    else:
        kept = {**setting._asdict(), "prior": prior, **cache}
        run = time_run(stream_generate(session, tokenizer, prompt, tokens, **kept))
    return {
        "total_tps": run.total_tps,
        "first_token_s": run.times[0],
        "prefill_peak_gb": run.prefill_peak / 1e9,
        "decode_peak_gb": run.decode_peak / 1e9,
        "held_gb": run.held / 1e9,
    }


class Comparison:
    """All rows of a run: those of an earlier one, and new ones.

    Args:
        args: the parsed flags.

    Attributes:
        rows: the rows so far.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        if args.json.is_file():
            self.rows = [json.loads(line) for line in args.json.read_text().splitlines()]
        self._args = args
        self._session, self._tokenizer = continuations.load_session(args)
        self._about = made_with() | {
            "model": model_name(args.model),
            "dtype": args.dtype,
            "seed": args.seed,
            "temperature": args.temp,
            "tokens": args.tokens,
        }
        self._prompts = [*self._make_prompts()]
        self._prior = find_or_measure_prior(
            self._session, self._tokenizer, args.prior, model=args.model
        )

    def _is_missing(self, row: Row) -> bool:
        return not any(all(old.get(k) == v for k, v in row.items()) for old in self.rows)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self._args.json, self.rows)

    def _make_prompts(self) -> Iterator[tuple[Row, list[int]]]:
        """Yield each prompt, with what identifies it in rows."""
        questions = read_prompts(self._args.prompts)[: self._args.limit]
        document = self._args.document.read_text(encoding="utf-8")
        for length in self._args.prompt_tokens:
            for number, messages in enumerate(questions):
                about = self._about | {"prompt_tokens": length, "text": number}
                question = messages[-1]["content"]
                yield about, make_prompt(self._tokenizer, question, document, length)

    def _selector(self, setting: Setting) -> Selector:
        config = GlassConfig(**setting._asdict())
        return make_selector(self._session, self._tokenizer, self._prior, config)

    def score(self, settings: list[Setting]) -> None:
        """Score all settings on all texts."""
        for about, prompt in self._prompts:
            missing = {
                setting: row
                for setting in settings
                if self._is_missing(row := about | {"what": "kl"} | setting._asdict())
            }
            if not missing:
                continue
            text = write_long(self._session, self._tokenizer, prompt, self._args)
            selectors = [self._selector(setting) for setting in missing]
            reading = DenseReading(self._session, text, [s.config.warmup for s in selectors])
            for row, selector in zip(missing.values(), selectors, strict=True):
                self._add(row | score_text(reading, selector))
            del reading
            mx.clear_cache()

    def generate(self, settings: list[Setting]) -> None:
        """Time a generation of each kind after the first prompt of each length."""
        self._tokenizer.eos_token_ids = []
        for about, prompt in self._prompts:
            if about["text"]:
                continue
            for kind, cache in caches(len(prompt) + self._args.tokens).items():
                for setting in (None, *settings):
                    kept = Setting(density=1.0) if setting is None else setting
                    row = about | {"what": "generation", "cache": kind} | kept._asdict()
                    row |= {"method": "dense" if setting is None else "default"}
                    if not self._is_missing(row):
                        continue
                    options = (self._args.tokens, setting, cache)
                    self._add(
                        row
                        | time_generation(
                            self._session, self._tokenizer, self._prior, prompt, options
                        )
                    )


def _setting_name(row: Row) -> str:
    if row.get("method") == "dense":
        return "dense"
    return Setting(row["max_kl"], row["density"], row["vocabulary"]).flags


def _edges(tokens: int) -> list[int]:
    """Return the ends of the stretches in the table, each twice as long as the one before."""
    edges = [4 * _BIN]
    while edges[-1] < tokens:
        edges.append(min(2 * edges[-1], tokens))
    return edges


def format_scores(rows: list[Row]) -> str:
    """Format KL by position as a table, as means over texts."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["what"] == "kl":
            groups.setdefault((row["prompt_tokens"], _setting_name(row)), []).append(row)
    longest = max(
        (_BIN * len(r["kl_by_position"]) for rs in groups.values() for r in rs), default=0
    )
    edges = _edges(longest)
    columns = ["prompt", "setting", "run", "KL", *(f"to {edge}" for edge in edges)]
    cells = []
    for (prompt, setting), members in groups.items():
        cell = [f"{prompt}", setting, f"{np.mean([r['run_share'] for r in members]):.3f}"]
        cell.append(f"{np.mean([r['kl'] for r in members]):.3f}")
        start = 0
        for edge in edges:
            stop = -(-edge // _BIN)
            values = [v for r in members for v in r["kl_by_position"][start:stop]]
            cell.append(f"{np.mean(values):.3f}" if values else "")
            start = stop
        cells.append(cell)
    return markdown_table(columns, cells, left=("setting",), padded=False)


def format_generations(rows: list[Row]) -> str:
    """Format speed and memory as a table."""
    columns = ["prompt", "cache", "setting", "tokens/s", "1st token s"]
    columns += ["prefill peak GB", "decode peak GB", "held GB"]
    keys = ("prefill_peak_gb", "decode_peak_gb", "held_gb")
    cells = [
        [
            f"{row['prompt_tokens']}",
            row["cache"],
            _setting_name(row),
            f"{row['total_tps']:.2f}",
            f"{row['first_token_s']:.2f}",
            *(f"{row[key]:.3f}" for key in keys),
        ]
        for row in rows
        if row["what"] == "generation"
    ]
    return markdown_table(columns, cells, left=("cache", "setting"), padded=False)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, and print the tables.

    Raises:
        FileNotFoundError: if the model, the prior, the prompts or the document do not exist.
        ValueError: for a bad value, or a document that is too short.
    """
    settings = make_settings(args, Setting(max_kl=DEFAULT_MAX_KL))
    check_minimums(args, tokens=_BIN, limit=1)
    if min(args.prompt_tokens) < 0:
        raise ValueError("--prompt-tokens must be at least 0")
    if not args.document.is_file():
        raise FileNotFoundError(f"there is no document at {args.document}")
    with locked(args.json):
        comparison = Comparison(args)
        comparison.score(settings)
        if args.generate:
            comparison.generate(settings)
    print(format_scores(comparison.rows))
    if args.generate:
        print()
        print(format_generations(comparison.rows))


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_long_texts"):
        run(setup_arg_parser().parse_args())


if __name__ == "__main__":
    main()
