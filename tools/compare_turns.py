"""Compare what the neurons of a second answer can be selected by, in a conversation of two turns.

The dense model answers each prompt, and then a second one that asks for more. For each way of
going by what was said before, the sliced model is scored on the second answer: one selection, after
so many of its tokens. KL in nats a token, mean over conversations.
"""

import argparse
import sys

import continuations
from glass_mlx import load, resolve_prior
from glass_mlx.chat import encode
from glass_mlx.checkpoints import DEFAULT_MODEL, add_load_arguments
from glass_mlx.command import ending
from glass_mlx.fidelity import Continuation, Reading, continue_densely, divergence, read_prompts
from glass_mlx.lookup import model_folder
from glass_mlx.models import find_ffns, with_taps
from glass_mlx.slicing import DEFAULT_WARMUP, Evidence, Slicer, Slicing

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

_MORE = "Tell me more about that, with an example."

# After how many tokens of the answer is selected, and which parts of the conversation count as the
# prompt, and which as text: 0 the first prompt, 1 its answer, 2 the second prompt, 3 what was
# written of its answer.
CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "the new prompt": (1, (2,), ()),
    "all before, as a prompt": (1, (0, 1, 2), ()),
    "the earlier answer": (1, (), (1,)),
    "the earlier answer, the new prompt": (1, (), (1, 2)),
    "this answer": (DEFAULT_WARMUP, (), (3,)),
    "this answer, the earlier one": (DEFAULT_WARMUP, (), (1, 3)),
    "both answers, both prompts": (DEFAULT_WARMUP, (), (0, 1, 2, 3)),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"Default: the built-in {DEFAULT_MODEL}")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--limit", type=int, help="so many prompts")
    continuations.add_arguments(parser)
    add_load_arguments(parser)
    return parser


def observe(model: nn.Module, parts: list[list[int]]) -> dict[str, Evidence]:
    """What the dense model sees of the parts of a conversation, by case."""
    seen = {name: Evidence.of(model, [Slicing.statistic]) for name in CASES}
    cache = make_prompt_cache(model)
    for n, tokens in enumerate(parts):
        counted = [e.prompt for name, e in seen.items() if n in CASES[name][1]]
        counted += [e.text for name, e in seen.items() if n in CASES[name][2]]

        def watch(path: str, hidden: mx.array, counted: list = counted) -> mx.array:
            for statistics in counted:
                hidden = statistics.update(path, hidden)
            return hidden

        def after(path: str, outputs: mx.array, counted: list = counted) -> mx.array:
            for statistics in counted:
                outputs = statistics.update_outputs(path, outputs)
            return outputs

        mx.eval(with_taps(model, watch, after)(mx.array([tokens]), cache=cache)[:, -1])
        mx.eval([[statistics.sums, statistics.outputs] for statistics in counted])
    return seen


def compare(args: argparse.Namespace) -> dict[tuple[float, str], list[float]]:
    """The KL of each conversation's second answer, by density and case."""
    model, tokenizer = load(args.model, dtype=args.dtype, dequantize=args.dequantize)
    prior, ffns = resolve_prior(model, folder=model_folder(tokenizer)), find_ffns(model)
    found: dict[tuple[float, str], list[float]] = {}
    for asked in tqdm(read_prompts(args.prompts)[: args.limit], unit="text", file=sys.stderr):
        sampling = (args.tokens, args.temp, args.seed)
        (first,) = continue_densely(model, tokenizer, [asked], *sampling)
        said = [*asked, {"role": "assistant", "content": tokenizer.decode(first.written)}]
        said.append({"role": "user", "content": _MORE})
        (second,) = continue_densely(model, tokenizer, [said], *sampling)
        if not first.written or len(second.written) <= 2 * DEFAULT_WARMUP:
            continue
        begun, answered = len(first.prompt), len(encode(tokenizer, said[:-1]))
        whole = second.prompt
        parts = [whole[:begun], whole[begun:answered], whole[answered:]]
        evidence = observe(model, [*parts, second.written[: DEFAULT_WARMUP - 1]])
        reading = Reading(model, Continuation(whole, second.written), (1, DEFAULT_WARMUP))
        for density in args.density:
            slicing = Slicing(density=density, prior=prior)
            for name, seen in evidence.items():
                start = CASES[name][0] - 1
                selection = slicing.select(ffns, seen)
                sliced, _ = Slicer(model, slicing.down_policy)(selection, seen.stand_ins())
                kl = divergence(reading.dense[start:], reading.follow(sliced, start)).mean()
                found.setdefault((density, name), []).append(kl.item())
    return found


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("compare_turns"):
        print("| density | selected after | by | KL | conversations |")
        print("| ---: | ---: | :--- | ---: | ---: |")
        for (density, name), kl in compare(args).items():
            after = CASES[name][0]
            print(f"| {density:g} | {after} | {name} | {np.mean(kl):.3f} | {len(kl)} |")


if __name__ == "__main__":
    main()
