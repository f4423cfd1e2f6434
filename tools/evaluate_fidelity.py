"""Measure how close sliced models stay to the dense one, by method and density.

The dense model continues the prompts (kept on disk for the next time). Every method is scored on
these tokens one by one: the prompt read densely, the FFNs sliced from the first generated token on
or, where the method says so, after a dense warm-up and renewed. A run that was interrupted goes on
where it was if it has --json. docs/results.md has what came out, and what the methods are.
"""

import argparse
import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fidelity_ablations import ABLATIONS, ablation_table
from fidelity_report import BASELINE, Outcome, plot, row, table
from glass_mlx import GlobalPrior, Selection, load, resolve_prior
from glass_mlx.checkpoints import DEFAULT_MODEL, add_load_arguments, model_name
from glass_mlx.command import ending
from glass_mlx.fidelity import (
    Continuation,
    Reading,
    Scores,
    Select,
    continue_in_batches,
    places,
    read_prompts,
    score,
)
from glass_mlx.files import cache_folder, locked, replacing
from glass_mlx.lookup import model_folder
from glass_mlx.models import find_ffns, fingerprint
from glass_mlx.models.linear import dense_weight
from glass_mlx.prior import cache_name
from glass_mlx.provenance import made_with
from glass_mlx.selection import budget, jaccard, select
from glass_mlx.slicing import Slicing
from tasks import TASKS, write_task

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

# A text to score, and where it has answers.
Text = tuple[Continuation, list[tuple[int, int]]]

_TASK_TEXTS = 16

PROMPTS = Path(__file__).with_name("test_prompts.txt")

# Static: one selection after the prompt. The paper's methods use mean activations on both sides,
# and keep the same share in every FFN.
_STATIC = {"warmup": 1, "refresh": 0}
_MEANS = {"statistic": "activation", "prior_statistic": "activation"}
_PAPER = _STATIC | _MEANS | {"mix": 0.5, "budgets": False}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": _PAPER,
    "magnitude": _PAPER,
    "prompt-only": _PAPER | {"mix": 0.0},
    "prompt-only-griffin": _PAPER | {"mix": 0.0, "statistic": "griffin"},
    "prior-only": _PAPER | {"mix": 1.0},
    "glass": _PAPER,
    "glass-impact": _PAPER | {"prior_statistic": "impact"},
    "glass-griffin": _PAPER | {"prior_statistic": "griffin"},
    "static": _STATIC,
    "warmup": {"refresh": 0},
    "refresh": {"warmup": 1},
    "uniform": {"budgets": False},
    "default": {},
    "oracle": _PAPER,
    "oracle-griffin": _PAPER | {"statistic": "griffin"},
}


# What does not fuse two rankings.
_WITHOUT_MIX = ("dense", "random", "magnitude", "oracle", "oracle-griffin")


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"Default: the built-in {DEFAULT_MODEL}")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        help="text with a prompt a line, or JSONL with prompt or messages (%(default)s)",
    )
    parser.add_argument("--limit", type=int, help="take only so many prompts, the first ones")
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="score exact answers to questions of this kind instead of continuations of prompts",
    )
    parser.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="print one of these tables instead: how well beginnings of texts and the prior rank "
        "the rest's neurons, how clear the cut between kept and dropped is, KL by evidence and "
        "length",
    )
    parser.add_argument("--density", type=float, nargs="+", default=[0.5])
    parser.add_argument("--tokens", type=int, default=256, help="generated tokens a prompt")
    parser.add_argument("--temp", type=float, default=0.7, help="temperature of sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts continued at once")
    parser.add_argument("--prior", help="Default: looked for as by glass_mlx.generate")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=["dense", "prompt-only", "prior-only", "glass", "default", "oracle"],
        help=f"some of {', '.join(METHODS)} (%(default)s)",
    )
    parser.add_argument(
        "--mix", type=float, nargs="+", default=[], help="values of λ for --mix-methods"
    )
    parser.add_argument(
        "--mix-methods",
        nargs="+",
        choices=[name for name in METHODS if name not in _WITHOUT_MIX],
        metavar="METHOD",
        default=["glass"],
        help="methods to score with every λ of --mix, too (%(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write one JSON line a method and density")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--plots", type=Path, help="draw plots into this folder")
    add_load_arguments(parser)
    return parser


def continuations(
    model: nn.Module, tokenizer: TokenizerWrapper, args: argparse.Namespace
) -> list[Continuation]:
    """What the dense model writes after the prompts, kept on disk by all that it depends on."""
    prompts = read_prompts(args.prompts)[: args.limit]
    what = [made_with(), prompts, args.tokens, args.temp, args.seed, args.batch_size]
    what += [args.dtype, args.dequantize, cache_name("", fingerprint(model))]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    file = cache_folder() / "continuations" / f"{digest}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = json.loads(file.read_text()) if file.is_file() else []
    asked = (prompts, args.tokens, args.temp, args.seed, args.batch_size)
    total, done = args.tokens * len(prompts), len(texts)
    with tqdm(total=total, initial=args.tokens * done, desc="writing", unit="tok") as bar:
        for batch in continue_in_batches(model, tokenizer, *asked, done, bar.update):
            texts += map(asdict, batch)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(texts))
    return [Continuation(**text) for text in texts]


def magnitudes(model: nn.Module) -> dict[str, np.ndarray]:
    """The product of the norms of each neuron's weights, (m,) by FFN: what knows no activation."""
    scores = {}
    for ffn in find_ffns(model):
        norms = [mx.linalg.norm(dense_weight(layer), axis=1) for layer in ffn.expand.values()]
        norms.append(mx.linalg.norm(dense_weight(ffn.contract[1]), axis=0))
        scores[ffn.path] = np.array(mx.stack(norms).astype(mx.float32).prod(axis=0))
    return scores


class Evaluation:
    """Scores methods on continuations.

    Args:
        model: the dense model.
        prior: its prior.
        methods: ways of slicing by name.
        densities: for each of them.
        seed: of the random selection.
    """

    def __init__(
        self,
        model: nn.Module,
        prior: GlobalPrior,
        methods: dict[str, dict[str, Any]],
        densities: list[float],
        seed: int,
    ) -> None:
        self.model, self.methods, self.densities, self._seed = model, methods, densities, seed
        self._ffns = find_ffns(model)
        self._multiples = {ffn.path: ffn.multiple for ffn in self._ffns}
        self._magnitudes = magnitudes(model) if "magnitude" in methods else {}
        self.slicings = {name: Slicing(prior=prior, **changes) for name, changes in methods.items()}
        for slicing in self.slicings.values():
            slicing.check()

    def __call__(
        self, text: Continuation, answers: list[tuple[int, int]], number: int
    ) -> dict[tuple[str, float], Outcome]:
        """The outcome of every method and density on a continuation."""
        sliced = [slicing for name, slicing in self.slicings.items() if name != "dense"]
        reading = Reading(self.model, text, places(sliced, len(text.written)))
        outcomes = {}
        for density in self.densities:
            oracle = self._top(reading.oracle.scores("activation"), density)
            for name, slicing in self.slicings.items():
                if name == "dense":
                    scores = Scores.exact(reading)
                else:
                    own = replace(slicing, density=density)
                    scores = score(reading, own, self._chooser(name, own, reading, number))
                outcomes[name, density] = self._outcome(scores, oracle, answers)
        return outcomes

    def _top(self, scores: dict[str, np.ndarray], density: float) -> Selection:
        return select(scores, density, self._multiples)

    def _chooser(self, name: str, slicing: Slicing, reading: Reading, number: int) -> Select | None:
        """How a method selects that does not select as the engine does."""
        if name == "random":
            rng = np.random.default_rng([self._seed, number])
            scores = {ffn.path: rng.random(ffn.width) for ffn in self._ffns}
        elif name == "magnitude":
            scores = self._magnitudes
        elif name.startswith("oracle"):
            scores = reading.oracle.scores(slicing.statistic)
        else:
            return None
        return lambda evidence: self._top(scores, slicing.density)

    def _outcome(
        self, scores: Scores, oracle: Selection, answers: list[tuple[int, int]]
    ) -> Outcome:
        selections = [*scores.selections.values()]
        agreement = [[*jaccard(selection, oracle).values()] for selection in selections]
        return Outcome(
            kl=[round(float(value), 6) for value in scores.kl],
            nll=[round(float(value), 6) for value in scores.nll],
            agrees=float(scores.agrees.mean()),
            exact=[bool(scores.right[start:stop].all()) for start, stop in answers],
            dense=int(scores.dense.sum()) + 1,
            reread=scores.reread,
            density=float(np.mean([s.density for s in selections])) if selections else None,
            jaccard=np.mean(agreement, axis=0).tolist() if selections else [],
        )


def evaluate(
    evaluation: Evaluation, texts: list[Text], identity: str, partial: Path | None
) -> dict[tuple[str, float], list[Outcome]]:
    """All outcomes; those of earlier runs of the same evaluation are in the partial file.

    Raises:
        ValueError: if the partial file is of another evaluation.
    """
    head, *lines = partial.read_text().split("\n") if partial and partial.is_file() else [identity]
    if head != identity:
        raise ValueError(
            f"{partial} is from another evaluation that was interrupted; finish that one with its "
            "own arguments, or delete the file"
        )
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the end of a run that was killed
            break
    if partial:
        with replacing(partial) as temporary:
            temporary.write_text("\n".join([head, *map(json.dumps, records)]) + "\n")
    outcomes: dict[tuple[str, float], list[Outcome]] = {}
    for number, text in enumerate(tqdm(texts, desc="scoring", unit="prompt")):
        if number < len(records):
            record = records[number]
        else:
            found = evaluation(*text, number)
            record = [[*key, asdict(outcome)] for key, outcome in found.items()]
            if partial:
                with partial.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        for method, density, outcome in record:
            outcomes.setdefault((method, density), []).append(Outcome(**outcome))
    return outcomes


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first value that is out of range, before anything is loaded."""
    for density in args.density:
        budget(1, density)
    for mix in args.mix:
        Slicing(mix=mix).check()
    for name, value, least in (
        ("--tokens", args.tokens, 2),
        ("--batch-size", args.batch_size, 1),
        ("--limit", 1 if args.limit is None else args.limit, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if args.ablation and (args.json or args.markdown or args.plots or len(args.density) > 1):
        raise ValueError("--ablation prints one table, at one density, and writes no files")
    if args.task is None:
        read_prompts(args.prompts)


def run(args: argparse.Namespace) -> None:
    """Load the model, score the methods and print and write what came out.

    Raises:
        FileNotFoundError: if the model, the prior or the prompts do not exist.
        ValueError: for a bad value, or a model, prior or prompts that cannot be used.
    """
    check(args)
    model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
    prior = resolve_prior(model, args.prior, model_folder(tokenizer), model_name(args.model))
    methods = {name: METHODS[name] for name in args.methods}
    for name in args.mix_methods if args.mix else ():
        methods |= {f"{name} λ {mix:g}": METHODS[name] | {"mix": mix} for mix in args.mix}
    evaluation = Evaluation(model, prior, methods, args.density, args.seed)
    if args.task:
        texts = [*write_task(args.task, tokenizer, args.limit or _TASK_TEXTS, args.seed)]
    else:
        texts = [(text, []) for text in continuations(model, tokenizer, args)]
    texts = [text for text in texts if len(text[0].written) > 1]
    if not texts:
        raise ValueError("the model ends every text at once; there is nothing to score")
    if args.ablation:
        bar = tqdm(texts, unit="prompt")
        rows = ABLATIONS[args.ablation](model, prior, (text for text, _ in bar), args.density[0])
        print(ablation_table(rows))
        return
    about = made_with() | {
        "model": model_name(args.model),
        "seed": args.seed,
        "temperature": args.temp,
        "dtype": args.dtype,
        "dequantize": args.dequantize,
        "prior": prior.about,
        "what": args.task or args.prompts.name,
    }
    slicings = [str(replace(slicing, prior=None)) for slicing in evaluation.slicings.values()]
    scores = [values.tobytes() for group in prior.scores.values() for values in group.values()]
    identity = [about, args.density, [*methods], slicings, [asdict(text) for text, _ in texts]]
    identity += [cache_name("", fingerprint(model)), hashlib.sha256(b"".join(scores)).hexdigest()]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    partial = args.json.with_name(f"{args.json.name}.partial") if args.json else None
    with locked(partial) if partial else nullcontext():
        outcomes = evaluate(evaluation, texts, digest, partial)
    rows = []
    for (method, density), found in sorted(outcomes.items(), key=lambda item: item[0][1]):
        paired = outcomes.get((BASELINE, density)) if method != BASELINE else None
        figures = row(found, paired, args.seed)
        rows.append({"method": method, "density": density} | figures | about)
    print(table(rows, markdown=False))
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.markdown:
        with replacing(args.markdown) as temporary:
            temporary.write_text(table(rows, markdown=True) + "\n")
    if args.plots:
        for file in plot(rows, args.plots):
            print(f"Wrote {file}", file=sys.stderr)
    if partial:
        partial.unlink()


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("evaluate_fidelity"):
        run(args)


if __name__ == "__main__":
    main()
