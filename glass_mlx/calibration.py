"""Measure a model's global prior, from text that the model writes itself or from a corpus.

Batch after batch, sequences are written (`recipes`) and read once more densely to measure the
FFNs' neurons. Each sequence gives one score a neuron and statistic; the prior keeps their mean and
spread. What is held beside the model does not grow with the number of tokens.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from glass_mlx.checkpoints import (
    DEFAULT_MODEL,
    add_adapter_arguments,
    add_load_arguments,
    advice,
    load,
    load_options,
    model_name,
)
from glass_mlx.command import ending
from glass_mlx.curve import STEPS, measure_curve
from glass_mlx.describe import describe, draw, stability_lines
from glass_mlx.files import locked, read_tensors, write_tensors
from glass_mlx.hub import locate, publish
from glass_mlx.impact import impact
from glass_mlx.models import find_ffns, fingerprint, weight_bytes, with_taps
from glass_mlx.prior import GlobalPrior
from glass_mlx.provenance import made_with
from glass_mlx.recipes import (
    SKIPPED,
    ChatFrame,
    Recipe,
    Sequence,
    Writer,
    chat_frame,
    padded,
    source,
)
from glass_mlx.slicing import DEFAULT_PRIOR_STATISTIC
from glass_mlx.stability import Stability, compare, overall
from glass_mlx.statistics import (
    IMPACT,
    PRIOR_STATISTICS,
    STATISTICS,
    NeuronStatistics,
    SequenceMoments,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

# As many tokens are read at once at most, which bounds the memory that reading takes.
_READ_TOKENS = 2048

_CHECKPOINT = "glass-calibration-1"


@dataclass(frozen=True)
class Settings:
    """How a prior is measured.

    Attributes:
        recipes: the texts to measure on; tokens are shared out by their weights. Default: see
            `default_recipes`.
        statistics: what to measure, of `PRIOR_STATISTICS`.
        tokens: how many tokens to measure at least.
        sequences: how many sequences to measure at least, instead of tokens.
        length: tokens a sequence.
        batch_size: sequences written at once.
        temperature: of sampling.
        seed: the same seed gives the same prior, interrupted or not.
        until_stable: stop before `tokens` when `stability.overall` of the two halves of the
            sequences reaches this.
        corpus_field: the field of a JSONL corpus that has the text.
        curve_texts: on how many texts of its own the model's density curve is measured, see
            `curve`; 0 for no curve. There is none without the statistic that decoding ranks by.
    """

    recipes: tuple[Recipe, ...] = ()
    statistics: tuple[str, ...] = ("activation", "griffin")
    tokens: int = 16384
    sequences: int | None = None
    length: int = 256
    batch_size: int = 32
    temperature: float = 1.0
    seed: int = 0
    until_stable: float | None = None
    corpus_field: str = "text"
    curve_texts: int = 16

    def check(self) -> None:
        """Raise ValueError for the first value that is out of range."""
        sequences = 1 if self.sequences is None else self.sequences
        for value in (self.tokens, sequences, self.length, self.batch_size, self.temperature):
            if not 0 < value < float("inf"):
                raise ValueError(
                    "tokens, sequences, length, batch size and temperature must be positive"
                )
        if self.length <= SKIPPED:
            raise ValueError(
                f"the length must be above {SKIPPED}, the number of positions that do not count"
            )
        if self.curve_texts < 0:
            raise ValueError(f"the texts of the curve must not be fewer than 0: {self.curve_texts}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, but is {self.seed}")
        if self.until_stable is not None and not 0 < self.until_stable < 1:
            raise ValueError(f"--until-stable must be between 0 and 1, not {self.until_stable}")
        if not self.statistics or not {*self.statistics} <= {*PRIOR_STATISTICS}:
            raise ValueError(
                f"statistics must be some of {', '.join(PRIOR_STATISTICS)}, "
                f"not {', '.join(self.statistics) or 'none'}"
            )


def default_recipes(tokenizer: TokenizerWrapper) -> tuple[Recipe, ...]:
    """The texts that a prior is measured on if none are named (docs/experiments.md has why)."""
    kinds = ("bos", "chat") if tokenizer.has_chat_template else ("bos",)
    return tuple(map(Recipe, kinds))


@dataclass(eq=False)
class _Text:
    """One recipe, and what was measured on it so far."""

    recipe: Recipe
    identity: dict[str, Any]
    moments: SequenceMoments
    frame: ChatFrame | None
    batches: int = 0
    ended: bool = False

    @property
    def sequences(self) -> int:
        return int(self.moments.sequences.sum())

    def about(self) -> dict[str, Any]:
        return self.identity | {"tokens": self.moments.tokens, "sequences": self.sequences}


def _measure(
    model: nn.Module, sequences: list[Sequence], statistics: tuple[str, ...], to: SequenceMoments
) -> None:
    """Read sequences densely, some at a time, and add their scores."""
    widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
    streaming = tuple(name for name in statistics if name in STATISTICS)
    step = max(1, _READ_TOKENS // max(len(sequence.tokens) for sequence in sequences))
    for at in range(0, len(sequences), step):
        group = sequences[at : at + step]
        tokens, mask = padded(group)
        running = NeuronStatistics(widths, streaming, len(group))

        def watch(
            path: str,
            hidden: mx.array,
            running: NeuronStatistics = running,
            mask: np.ndarray = mask,
        ) -> mx.array:
            return running.update(path, hidden, mask)

        if streaming:
            with_taps(model, watch)(tokens)
            mx.eval(running.sums)
            if running.tokens == 0:
                raise ValueError("this model does not run the modules that it shows")
        scores = {name: running.sequence_scores(name) for name in streaming}
        if IMPACT in statistics:
            each = [impact(model, sequence.tokens, sequence.counted) for sequence in group]
            scores[IMPACT] = {
                path: np.stack([np.array(sequence[path]) for sequence in each]) for path in widths
            }
        for values in scores.values():
            if not all(np.isfinite(value).all() for value in values.values()):
                raise ValueError(
                    "the model's activations or gradients are not finite in this precision; "
                    "try another one with --dtype"
                )
        to.add(scores, sum(sum(sequence.counted) for sequence in group))


def _mean(
    texts: list[_Text], statistic: str, path: str, half: Literal[0, 1] | None = None
) -> np.ndarray:
    """The weighted mean of the recipes' scores, (m,) float64."""
    weights = [text.recipe.weight for text in texts]
    means = [text.moments.mean(statistic, path, half) for text in texts]
    return np.average(means, axis=0, weights=weights)


def _spread(texts: list[_Text], statistic: str, path: str) -> np.ndarray:
    """The standard deviation of a score over sequences of the mixture of recipes, (m,) float64."""
    weights = [text.recipe.weight for text in texts]
    mean = _mean(texts, statistic, path)
    variances = [
        text.moments.variance(statistic, path) + (text.moments.mean(statistic, path) - mean) ** 2
        for text in texts
    ]
    return np.sqrt(np.average(variances, axis=0, weights=weights))


def _stability(texts: list[_Text], statistics: tuple[str, ...]) -> dict[str, Stability]:
    """Compare the halves of the sequences, by statistic; empty while a half has none."""
    if not all(text.moments.sequences.all() or text.ended for text in texts):
        return {}
    texts = [text for text in texts if text.moments.sequences.all()]
    if not texts:
        return {}
    halves = {
        name: [
            {path: _mean(texts, name, path, half) for path in texts[0].moments.sums[name]}
            for half in (0, 1)
        ]
        for name in statistics
    }
    return {name: compare(*pair) for name, pair in halves.items()}


def _tokens(texts: list[_Text]) -> int:
    return sum(text.moments.tokens for text in texts)


def _next(
    texts: list[_Text], settings: Settings, stability: dict[str, Stability]
) -> tuple[_Text, int] | None:
    """Choose the recipe to go on with, and how many sequences; None if enough was measured."""
    if settings.until_stable and stability and overall(stability) >= settings.until_stable:
        return None
    sequences = sum(text.sequences for text in texts)
    if settings.sequences is not None:
        left = settings.sequences - sequences
    else:
        each = _tokens(texts) / sequences if sequences else settings.length
        left = math.ceil((settings.tokens - _tokens(texts)) / each)
    # Every recipe gets its share of the tokens, and be it one sequence.
    texts = [text for text in texts if not text.ended and (left > 0 or text.sequences == 0)]
    if not texts:
        return None
    text = min(texts, key=lambda text: text.moments.tokens / text.recipe.weight)
    return text, max(1, min(settings.batch_size, left))


def _save(file: Path, texts: list[_Text], identity: str) -> None:
    tensors = {
        f"{n}.{key}": values
        for n, text in enumerate(texts)
        for key, values in (text.moments.state() | {"batches": np.array([text.batches])}).items()
    }
    frames = [text.frame and asdict(text.frame) for text in texts]
    write_tensors(file, tensors, _CHECKPOINT, {"identity": identity, "frames": frames})


def _resume(file: Path, texts: list[_Text], identity: str) -> None:
    """Go on from the file of an interrupted calibration, if there is one."""
    if not file.is_file():
        return
    try:
        tensors, about = read_tensors(file, _CHECKPOINT)
    except ValueError as error:
        raise ValueError(f"{error}; delete it to begin again") from error
    if about["identity"] != identity:
        raise ValueError(
            f"{file} is from another calibration that was interrupted; finish that one with its "
            "own arguments, or delete the file"
        )
    for n, (text, frame) in enumerate(zip(texts, about["frames"], strict=True)):
        start = f"{n}."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        text.moments.restore(state)
        text.batches = int(state["batches"][0])
        # A template may write the date: go on with the text that was begun with.
        text.frame = frame and ChatFrame(**frame)


def _run(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    texts: list[_Text],
    settings: Settings,
    save: Callable[[], None],
) -> dict[str, Stability]:
    """Write and read batch after batch until enough is measured; return the stability."""
    total = settings.sequences * settings.length if settings.sequences else settings.tokens
    with (
        tqdm(total=total, initial=_tokens(texts), unit="tok", dynamic_ncols=True) as bar,
        wired_limit(model, [generation_stream]),
    ):
        read = {}
        for n, text in enumerate(texts):
            writer = Writer(
                model,
                settings.temperature,
                [settings.seed, n],
                lambda written: bar.update(min(written, total - bar.n)),
            )
            read[text] = source(
                text.recipe,
                writer,
                tokenizer,
                settings.length,
                text.frame,
                settings.corpus_field,
                text.sequences,
            )
        stability = _stability(texts, settings.statistics)
        while (step := _next(texts, settings, stability)) is not None:
            text, size = step
            bar.set_description("writing" if text.recipe.file is None else None)
            sequences = read[text](size, text.batches)
            if not sequences:
                text.ended = True
                continue
            before = _tokens(texts)
            bar.set_description("reading")
            _measure(model, sequences, settings.statistics, text.moments)
            mx.clear_cache()
            text.batches += 1
            save()
            stability = _stability(texts, settings.statistics)
            bar.n = _tokens(texts)
            bar.total = max(total, bar.n)
            bar.set_postfix(stability=f"{overall(stability):.3f}" if stability else "none yet")
            if before.bit_length() < bar.n.bit_length():  # at every doubling
                peak = f"peak memory {mx.get_peak_memory() / 1e9:.3f} GB"
                lines = [f"after {bar.n} tokens, {peak}:", *stability_lines(stability)]
                bar.write("\n".join(lines), file=sys.stderr)
    return stability


def _dtype(model: nn.Module) -> str:
    """The first floating type among the model's arrays, which is what it computes in."""
    arrays = (array for _, array in tree_flatten(model.parameters()))
    dtype = next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    return str(dtype).removeprefix("mlx.core.")


def calibrate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    settings: Settings | None = None,
    *,
    name: str = "",
    checkpoint: Path | None = None,
) -> GlobalPrior:
    """Measure a global prior.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        settings: how to measure.
        name: the model's name, for the record.
        checkpoint: a file for the sums so far, written after every batch and read at the start
            if it belongs to the same call.

    Raises:
        FileNotFoundError: if there is no such corpus.
        ValueError: if the model cannot be sliced, a setting is out of range, or a recipe does not
            go with the tokenizer or gives no text.
    """
    settings = settings or Settings()
    settings.check()
    recipes = settings.recipes or default_recipes(tokenizer)
    widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
    corners = fingerprint(model)
    texts = [
        _Text(
            recipe,
            recipe.identity(),
            SequenceMoments(widths, settings.statistics),
            chat_frame(tokenizer) if recipe.kind == "chat" else None,
        )
        for recipe in recipes
    ]
    about = made_with() | {
        "model": name,
        "model_type": getattr(model, "model_type", ""),
        "dtype": _dtype(model),
        "settings": {
            name: value
            for name, value in asdict(settings).items()
            if name not in ("recipes", "statistics", "curve_texts") and value is not None
        },
    }
    weights = [weight_bytes(model), sum(float(corner.sum()) for corner in corners.values())]
    identity = json.dumps([about, settings.statistics, [t.identity for t in texts], weights])
    if checkpoint:
        _resume(checkpoint, texts, identity)

    def save() -> None:
        if checkpoint:
            _save(checkpoint, texts, identity)

    stability = _run(model, tokenizer, texts, settings, save)
    for text in texts:
        if text.sequences == 0:
            raise ValueError(f"the recipe {text.identity} gave no text to measure")
    about |= {
        "recipes": [text.about() for text in texts],
        "tokens": _tokens(texts),
        "sequences": sum(text.sequences for text in texts),
        "stability": stability,
    }
    scores, spread = (
        {
            name: {path: of(texts, name, path).astype(np.float32) for path in widths}
            for name in settings.statistics
        }
        for of in (_mean, _spread)
    )
    prior = GlobalPrior(scores, corners, about, spread)
    if settings.curve_texts and DEFAULT_PRIOR_STATISTIC in settings.statistics:
        with (
            tqdm(total=STEPS * settings.curve_texts, desc="density curve", unit="read") as bar,
            wired_limit(model, [generation_stream]),
        ):
            try:
                about |= measure_curve(
                    model,
                    tokenizer,
                    prior,
                    settings.curve_texts,
                    settings.length,
                    settings.batch_size,
                    settings.seed,
                    bar.update,
                )
            except ValueError as error:  # the prior is good without it
                bar.write(f"no density curve: {error}", file=sys.stderr)
    return prior


def build(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    output: Path,
    settings: Settings | None = None,
    name: str = "",
) -> GlobalPrior:
    """Measure a global prior into a file; an interrupted call is gone on with by the same one.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        output: the file to write. What is measured so far is in one beside it.
        settings: how to measure.
        name: the model's name, for the record.

    Raises:
        FileNotFoundError: if there is no such corpus.
        OSError: if a file cannot be written.
        ValueError: if another run is writing the file, or see `calibrate`.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give the name of a file")
    partial = output.with_name(f"{output.name}.partial")
    with locked(output, partial):
        prior = calibrate(model, tokenizer, settings, name=name, checkpoint=partial)
        prior.save(output)
        partial.unlink(missing_ok=True)
    return prior


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description="Measure the global prior of a model and write it to a file, or show one."
    )
    parser.add_argument(
        "--model", help=f"hub id, folder or GGUF file. Default: the built-in {DEFAULT_MODEL}"
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--output",
        type=Path,
        help="the file to write. An interrupted run is gone on with by the same command",
    )
    action.add_argument(
        "--show", metavar="FILE", help="say what a prior (a file or hub:user/repo) is, and draw it"
    )
    parser.add_argument(
        "--picture", type=Path, help="the PNG that --show draws. Default: FILE's name with .png"
    )
    parser.add_argument(
        "--push-to-hub", metavar="USER/REPO", help="publish the prior there, with a model card"
    )
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--recipe",
        nargs="+",
        action="extend",
        default=[],
        metavar="RECIPE",
        help="texts to measure on, each with =WEIGHT or without: bos (written by the model from "
        "the beginning-of-sequence token), chat (through its chat template) or corpus:FILE (text, "
        "or JSONL with messages, prompt and completion, or text). Default: bos and chat, or bos "
        "alone if the model has no chat template",
    )
    group.add_argument(
        "--statistic",
        nargs="+",
        action="extend",
        choices=PRIOR_STATISTICS,
        help=f"what to measure; impact takes a backward pass ({' '.join(defaults.statistics)})",
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens", type=int, default=defaults.tokens, help="tokens to measure (%(default)s)"
    )
    amount.add_argument("--sequences", type=int, help="sequences to measure, instead of tokens")
    group.add_argument(
        "--until-stable",
        type=float,
        metavar="X",
        help="stop earlier, once the neurons that two halves of the data keep at density 0.5 have "
        "a Jaccard index of X",
    )
    group.add_argument(
        "--length", type=int, default=defaults.length, help="tokens a sequence (%(default)s)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="sequences written at once (%(default)s)",
    )
    group.add_argument(
        "--temp",
        type=float,
        default=defaults.temperature,
        help="sampling temperature (%(default)s)",
    )
    group.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    group.add_argument(
        "--corpus-field",
        default=defaults.corpus_field,
        help="the field of a JSONL corpus that has the text (%(default)s)",
    )
    group.add_argument(
        "--curve-texts",
        type=int,
        default=defaults.curve_texts,
        help="texts to measure KL by density on, for --density auto; 0 for none (%(default)s)",
    )
    add_load_arguments(parser)
    add_adapter_arguments(parser)
    return parser


def _show(args: argparse.Namespace) -> tuple[GlobalPrior, Path]:
    file = locate(args.show)
    prior = GlobalPrior.load(file)
    print(describe(prior))
    picture = args.picture or Path(f"{file.stem}.png")
    draw(prior, picture)
    print(f"\npicture     {picture}")
    return prior, file


def _build(args: argparse.Namespace) -> tuple[GlobalPrior, Path]:
    settings = Settings(
        recipes=tuple(map(Recipe.parse, args.recipe)),
        statistics=tuple(dict.fromkeys(args.statistic or Settings.statistics)),
        tokens=args.tokens,
        sequences=args.sequences,
        length=args.length,
        batch_size=args.batch_size,
        temperature=args.temp,
        seed=args.seed,
        until_stable=args.until_stable,
        corpus_field=args.corpus_field,
        curve_texts=args.curve_texts,
    )
    settings.check()
    model, tokenizer = load(args.model, lazy=True, **load_options(args))
    if hint := advice(model):
        print(hint, file=sys.stderr)
    start = time.perf_counter()
    prior = build(model, tokenizer, args.output, settings, model_name(args.model))
    about = prior.about
    stability = f"{overall(about['stability']):.3f}" if about["stability"] else "not known"
    print(
        f"Wrote {args.output}: {about['tokens']} tokens in {about['sequences']} sequences, "
        f"{time.perf_counter() - start:.1f} s, stability {stability}\n"
        f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB"
    )
    return prior, args.output


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    interrupted = "\nInterrupted; the same command goes on after the last whole batch"
    with ending("build_priors", interrupted):
        prior, file = _show(args) if args.show else _build(args)
        if args.push_to_hub:
            print(f"Published at {publish(prior, file, args.push_to_hub)}")


if __name__ == "__main__":
    main()
