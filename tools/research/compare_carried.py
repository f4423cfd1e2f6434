"""Compare second answers with and without the statistics of the first turn of a conversation.

The dense model answers each prompt, and then a second prompt that asks for more, and one on another
subject. The second answers are scored with all renewals, as in `glass-mlx fidelity`: once with the
statistics that generating the first answer has left in the prompt cache, and once with those of a
new cache, into which the whole conversation is read as a prompt. The cached keys and values are the
same. The table has KL in nats per token, as means over conversations with standard errors.
"""

import argparse
import copy
import sys
from collections.abc import Iterator

from glass_mlx import GlassConfig, PromptCache, Session, make_prompt_cache, stream_generate
from glass_mlx.arguments import (
    add_load_arguments,
    add_model_argument,
    add_prior_argument,
    add_settings_arguments,
    check_minimums,
    make_settings,
)
from glass_mlx.calibration.first_use import find_or_measure_prior, make_selector
from glass_mlx.config import Setting
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import Continuation, read_prompts
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prompt_cache import read_prompt
from glass_mlx.reporting.tables import markdown_table

import continuations
import mlx.core as mx
import numpy as np
from compare_turns import second_prompts, write_conversation
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

SUBJECTS = {"the same": False, "another": True}
STATISTICS = ("carried", "new")

# At a bound of 0 no statistics of neurons count.
DEFAULT = Setting(max_kl=0.1)

# KL of each conversation by subject, setting and statistics.
Results = dict[tuple[str, Setting, str], list[float]]


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    add_prior_argument(parser)
    add_settings_arguments(parser, f"a bound of {DEFAULT.max_kl}")
    parser.add_argument("--limit", type=int, default=10, help="Prompts to use (%(default)s).")
    continuations.add_arguments(parser)
    add_load_arguments(parser)
    return parser


def carried_cache(
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    parts: list[list[int]],
    config: GlassConfig,
) -> PromptCache:
    """Return the cache that generating a given first answer leaves, with the second prompt read.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        prior: its prior.
        parts: the tokens of the first prompt, of its answer and of the second prompt.
        config: the settings of the generation.
    """
    prompt, answer, second = parts
    cache, following = make_prompt_cache(session), iter(answer)

    def give(logprobs: mx.array) -> mx.array:
        return mx.array([next(following, answer[-1])])

    options = {"prior": prior, "config": config, "prompt_cache": cache, "sampler": give}
    for _ in stream_generate(session, tokenizer, prompt, len(answer), **options):
        pass
    read_prompt(session, [*prompt, *answer, *second][len(cache.tokens) :], cache)
    return cache


def read_both(
    session: Session, answer: Continuation, carried: PromptCache, warmup: int
) -> Iterator[tuple[str, DenseReading]]:
    """Yield the readings of a second answer with carried and with new statistics."""
    new = make_prompt_cache(session)
    read_prompt(session, answer.prompt, new)
    layers, statistics = copy.deepcopy([*new]), carried.statistics
    assert statistics is not None
    caches = (PromptCache(layers, statistics.copy(), answer.prompt), new)
    for name, cache in zip(STATISTICS, caches, strict=True):
        yield name, DenseReading(session, answer, [warmup], cache)


def compare(args: argparse.Namespace) -> Results:
    """Return the KL of each second answer."""
    session, tokenizer = continuations.load_session(args)
    prior = find_or_measure_prior(session, tokenizer, args.prior, model=args.model)
    results: Results = {}
    for subject, is_new in SUBJECTS.items():
        prompts = read_prompts(args.prompts)[: args.limit]
        pairs = zip(prompts, second_prompts(prompts, is_new), strict=True)
        for messages, second in tqdm(pairs, total=len(prompts), desc=subject, file=sys.stderr):
            conversation = write_conversation(session, tokenizer, messages, second, args)
            if conversation is None:
                continue
            (*parts, _), answer = conversation
            for setting in make_settings(args, DEFAULT):
                config = GlassConfig(**setting._asdict())
                selector = make_selector(session, tokenizer, prior, config)
                carried = carried_cache(session, tokenizer, prior, parts, config)
                for name, reading in read_both(session, answer, carried, selector.config.warmup):
                    kl = float(score(reading, selector).kl.mean())
                    results.setdefault((subject, setting, name), []).append(kl)
    return results


def format_results(results: Results) -> str:
    """Format KL as a table."""
    cells = []
    for (subject, setting, name), kl in results.items():
        mean = f"{np.mean(kl):.3f} ± {continuations.standard_error(kl):.3f}"
        cells.append([subject, f"`{setting.flags}`", name, mean, f"{len(kl)}"])
    columns = ["subject", "setting", "statistics", "KL", "conversations"]
    return markdown_table(columns, cells, left=("subject", "setting", "statistics"), padded=False)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_carried"):
        args = setup_arg_parser().parse_args()
        check_minimums(args, limit=2, tokens=2 * GlassConfig.warmup + 1)
        print(format_results(compare(args)))


if __name__ == "__main__":
    main()
