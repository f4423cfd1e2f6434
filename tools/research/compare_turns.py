"""Compare statistics for selecting neurons in the second answer of a conversation.

The dense model answers each prompt, and then a second prompt that asks for more or, with
--new-subject, the next prompt of the file. The statistics can come from different parts of the
conversation. For each choice of parts, neurons are selected once,
and the sliced model is scored on the rest of the second answer. The table has KL in nats per token,
as a mean over conversations.
"""

import argparse
import sys
from typing import NamedTuple

from glass_mlx import GlassConfig, Session
from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.chat_templates import encode
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import Continuation, Messages, continue_all, read_prompts
from glass_mlx.fidelity.scoring import DenseReading, divergence
from glass_mlx.models import with_taps
from glass_mlx.prior.lookup import model_folder
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.selection import Selector
from glass_mlx.slicing import mean_compensation
from glass_mlx.statistics import LocalStatistics, NeuronStatistics

import continuations
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

_SECOND_PROMPT = "Tell me more about that, with an example."

# The parts of a conversation. The last one is the beginning of the second answer, up to the
# selection.
FIRST_PROMPT, FIRST_ANSWER, SECOND_PROMPT, SECOND_ANSWER = range(4)


class Case(NamedTuple):
    """A choice of parts of the conversation.

    Attributes:
        point: the number of tokens of the second answer after which neurons are selected.
        prompt: the parts that count as the prompt.
        text: the parts that count as generated text.
    """

    point: int
    prompt: tuple[int, ...]
    text: tuple[int, ...]


CASES = {
    "the new prompt": Case(1, (SECOND_PROMPT,), ()),
    "everything so far, as a prompt": Case(1, (FIRST_PROMPT, FIRST_ANSWER, SECOND_PROMPT), ()),
    "the earlier answer": Case(1, (), (FIRST_ANSWER,)),
    "the earlier answer, the new prompt": Case(1, (), (FIRST_ANSWER, SECOND_PROMPT)),
    "this answer": Case(GlassConfig.warmup, (), (SECOND_ANSWER,)),
    "this answer, the earlier one": Case(GlassConfig.warmup, (), (FIRST_ANSWER, SECOND_ANSWER)),
    "both answers, both prompts": Case(
        GlassConfig.warmup, (), (FIRST_PROMPT, FIRST_ANSWER, SECOND_PROMPT, SECOND_ANSWER)
    ),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--limit", type=int, help="Use only the first LIMIT prompts.")
    parser.add_argument(
        "--new-subject",
        action="store_true",
        help="Let the second prompt be the next one of the file, on another subject.",
    )
    continuations.add_arguments(parser)
    add_load_arguments(parser)
    return parser


def second_prompts(prompts: list[Messages], new_subject: bool) -> list[str]:
    """Return the second prompt of each conversation: one that asks for more, or the next first one.

    Raises:
        ValueError: if there is no other subject.
    """
    if not new_subject:
        return [_SECOND_PROMPT] * len(prompts)
    if len(prompts) < 2:
        raise ValueError("--new-subject needs at least two prompts")
    return [messages[-1]["content"] for messages in (*prompts[1:], prompts[0])]


def write_conversation(
    session: Session,
    tokenizer: TokenizerWrapper,
    messages: Messages,
    second_prompt: str,
    args: argparse.Namespace,
) -> tuple[list[list[int]], Continuation] | None:
    """Have the dense model answer a prompt and then the second one.

    Args:
        session: the dense model's session.
        tokenizer: its tokenizer.
        messages: the first prompt.
        second_prompt: what the user says after the answer.
        args: the flags of `continuations.add_arguments`.

    Returns:
        The tokens of each part of the conversation, and the second answer with everything before
        it as its prompt. None if an answer is too short.
    """
    settings = continuations.writing_settings(args)
    (first,) = continue_all(session.model, tokenizer, [messages], settings)
    first_turn = [*messages, {"role": "assistant", "content": tokenizer.decode(first.written)}]
    second_turn = [*first_turn, {"role": "user", "content": second_prompt}]
    (second,) = continue_all(session.model, tokenizer, [second_turn], settings)
    if not first.written or len(second.written) <= 2 * GlassConfig.warmup:
        return None
    tokens = second.prompt
    answer_start, answer_stop = len(first.prompt), len(encode(tokenizer, first_turn))
    parts = [tokens[:answer_start], tokens[answer_start:answer_stop], tokens[answer_stop:]]
    return [*parts, second.written[: GlassConfig.warmup - 1]], second


def observe_parts(session: Session, parts: list[list[int]]) -> dict[str, LocalStatistics]:
    """Have the dense model read the parts of a conversation, and return each case's statistics."""
    observed = {name: session.empty_statistics([GlassConfig.statistic]) for name in CASES}
    cache = make_prompt_cache(session.model)
    for part, tokens in enumerate(parts):
        updated = [local.prompt for name, local in observed.items() if part in CASES[name].prompt]
        updated += [local.text for name, local in observed.items() if part in CASES[name].text]
        _read(session, tokens, cache, updated)
    return observed


def _read(
    session: Session, tokens: list[int], cache: list[object], updated: list[NeuronStatistics]
) -> None:
    """Read some tokens, and add them to several statistics."""

    def observe(path: str, hidden: mx.array) -> mx.array:
        for statistics in updated:
            hidden = statistics.update(path, hidden)
        return hidden

    def observe_output(path: str, outputs: mx.array) -> mx.array:
        for statistics in updated:
            outputs = statistics.update_outputs(path, outputs)
        return outputs

    model = with_taps(session.model, observe, observe_output, ffns=session.ffns)
    mx.eval(model(mx.array([tokens]), cache=cache)[:, -1])
    mx.eval([[statistics.sums, statistics.outputs] for statistics in updated])


def mean_kl(reading: DenseReading, selector: Selector, local: LocalStatistics, point: int) -> float:
    """Return the mean KL of the tokens after a selection from some local statistics."""
    sliced = reading.session.sliced_model(selector.config.down_policy)
    sliced.update(selector.select(local), mean_compensation(local))
    start = point - 1
    logprobs = reading.follow(sliced.model, start)
    return float(divergence(reading.dense[start:], logprobs).mean())


def compare(args: argparse.Namespace) -> dict[tuple[float, str], list[float]]:
    """Return the KL of each conversation's second answer, by density and case."""
    session, tokenizer = continuations.load_session(args)
    prior = session.find_prior(folder=model_folder(tokenizer))
    results: dict[tuple[float, str], list[float]] = {}
    prompts = read_prompts(args.prompts)[: args.limit]
    pairs = zip(prompts, second_prompts(prompts, args.new_subject), strict=True)
    for messages, second in tqdm(pairs, total=len(prompts), unit="text", file=sys.stderr):
        conversation = write_conversation(session, tokenizer, messages, second, args)
        if conversation is None:
            continue
        parts, answer = conversation
        observed = observe_parts(session, parts)
        reading = DenseReading(session, answer, (1, GlassConfig.warmup))
        for density in args.density:
            selector = session.selector(GlassConfig(density=density), prior)
            for name, local in observed.items():
                kl = mean_kl(reading, selector, local, CASES[name].point)
                results.setdefault((density, name), []).append(kl)
    return results


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_turns"):
        args = setup_arg_parser().parse_args()
        columns = ["density", "selected after", "by", "KL", "conversations"]
        rows = [
            [f"{density:g}", f"{CASES[name].point}", name, f"{np.mean(kl):.3f}", f"{len(kl)}"]
            for (density, name), kl in compare(args).items()
        ]
        print(markdown_table(columns, rows, left=("by",), padded=False))


if __name__ == "__main__":
    main()
