"""Compare the ways to slice a quantized down projection by what they cost in fidelity.

The dense model continues some prompts; each policy is scored on these tokens. Slices are turned
into floats after slicing: the numbers are the same, and a CPU computes them much faster.
"""

import argparse
from collections.abc import Iterable

from glass_mlx import Selection, load, resolve_prior
from glass_mlx.checkpoints import DEFAULT_MODEL
from glass_mlx.engine import slice_model
from glass_mlx.models import FFN, find_ffns, with_modules, with_taps
from glass_mlx.models.linear import dense_weight
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import select
from glass_mlx.statistics import NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

PROMPTS = (
    "Explain how a vaccine works.",
    "Write a short story about a lighthouse keeper.",
    "Write a Python function that reverses a string.",
    "List five breakfasts for a cold morning.",
    "What is 12 times 11?",
    "Give me advice on learning the guitar.",
    "Describe the water cycle to a child.",
    "Write a polite letter to a landlord about a broken heater.",
)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=f"a quantized model. Default: {DEFAULT_MODEL}")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens a prompt")
    parser.add_argument("--temp", type=float, default=0.7, help="temperature of sampling")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def as_float(layer: nn.Module) -> nn.Linear:
    """A linear layer with a quantized one's numbers."""
    dense = nn.Linear(1, 1, bias=False)
    dense.weight = dense_weight(layer)
    if layer.get("bias") is not None:
        dense.bias = layer.bias
    return dense


def sliced(model: nn.Module, ffns: list[FFN], selection: Selection, policy: str) -> nn.Module:
    """The float model with its FFNs replaced by slices of the quantized ones."""
    parts = {f.path: f.sliced(selection.indices[f.path], policy) for f in ffns}
    return with_modules(
        model, {path: {n: as_float(m) for n, m in p.items()} for path, p in parts.items()}
    )


def log_probabilities(model: nn.Module, tokens: list[int], cache: list) -> mx.array:
    """Log-probabilities (T, vocabulary) of the token after each of `tokens`."""
    logits = model(mx.array(tokens)[None], cache=cache)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> float:
    """Mean KL(p || q) in nats per token, of log-probabilities (T, vocabulary)."""
    return (mx.exp(p) * (p - q)).sum(-1).mean().item()


def compare(
    args: argparse.Namespace, policies: Iterable[str]
) -> dict[tuple[float, str], list[tuple[float, float]]]:
    """For each density and policy, KL(dense || sliced) and KL(exact slice || sliced) a prompt."""
    quantized, tokenizer = load(args.model, dtype="float32")
    model, _ = load(args.model, dtype="float32", dequantize=True)
    ffns = find_ffns(quantized)
    prior = resolve_prior(model).scores["activation"]
    results: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for prompt in tqdm(PROMPTS, unit="prompt"):
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        mx.random.seed(args.seed)
        steps = generate_step(
            mx.array(tokens), model, max_tokens=args.tokens, sampler=make_sampler(args.temp)
        )
        written = [token for token, _ in steps]

        def prefilled(statistics: NeuronStatistics, tokens: list[int] = tokens) -> list:
            cache = make_prompt_cache(model)
            tapped = with_taps(model, statistics.update)
            mx.eval(tapped(mx.array(tokens)[None], cache=cache), statistics.sums)
            return cache

        statistics = NeuronStatistics({f.path: f.width for f in ffns})
        dense = log_probabilities(model, written[:-1], prefilled(statistics))
        fused = {
            path: fuse(ranks(scores), ranks(prior[path]), 0.5)
            for path, scores in statistics.scores("activation").items()
        }
        for density in args.density:
            selection = select(fused, density, {f.path: f.multiple for f in ffns})
            exact = log_probabilities(
                slice_model(model, selection, "requantize"), written[:-1], prefilled(statistics)
            )
            scored = {"exact": exact} | {
                policy: log_probabilities(
                    sliced(model, ffns, selection, policy), written[:-1], prefilled(statistics)
                )
                for policy in policies
            }
            for policy, ours in scored.items():
                pair = (divergence(dense, ours), divergence(exact, ours))
                results.setdefault((density, policy), []).append(pair)
    return results


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    print("| density | down | KL(dense, sliced) | KL(exact slice, sliced) |")
    print("| ---: | :--- | ---: | ---: |")
    for (density, policy), pairs in compare(args, ("requantize",)).items():
        kl, extra = np.mean(pairs, axis=0)
        print(f"| {density:g} | {policy} | {kl:.3f} | {extra:.4f} |")


if __name__ == "__main__":
    main()
