"""Compare samplers by how often drafts are wrong, in generations that follow prompts.

mlx-lm's sampler looks a random number up among cumulative probabilities, and glass-mlx's adds
Gumbel noise (`glass_mlx.sampling`). Both write the dense model's own text.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from glass_mlx.arguments import add_load_arguments, add_model_argument
from glass_mlx.calibration.first_use import find_needed_prior
from glass_mlx.chat_templates import encode
from glass_mlx.decoding import Sampler
from glass_mlx.errors import exit_on_error
from glass_mlx.fidelity.prompts import read_prompts
from glass_mlx.reporting.tables import markdown_table
from glass_mlx.sampling import make_sampler
from glass_mlx.streaming import stream_generate

import continuations
import mlx.core as mx
from mlx_lm import sample_utils
from tqdm import tqdm

SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "mlx-lm": sample_utils.make_sampler,
    "Gumbel noise": make_sampler,
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        default=continuations.PROMPTS,
        help="Prompts, one per line (%(default)s).",
    )
    parser.add_argument("--limit", type=int, default=8, help="Number of prompts (%(default)s).")
    parser.add_argument("--tokens", type=int, default=256, help="Tokens per text (%(default)s).")
    parser.add_argument("--temp", type=float, nargs="+", default=[0.7, 1.0], help="(%(default)s)")
    parser.add_argument("--max-kl", type=float, default=0.0, help="(%(default)s)")
    add_load_arguments(parser)
    return parser


def compare(args: argparse.Namespace) -> dict[tuple[float, str], tuple[int, int, float]]:
    """Return the checked tokens, their drafts, and the share of bytes of all tokens.

    They are by temperature and sampler.
    """
    session, tokenizer = continuations.load_session(args)
    prior = find_needed_prior(session, tokenizer, model=args.model)
    prompts = [encode(tokenizer, messages) for messages in read_prompts(args.prompts)[: args.limit]]
    results = {}
    modes = [(temp, name) for temp in args.temp for name in SAMPLERS]
    for temp, name in tqdm(modes, unit="mode"):
        checked = drafts = read = dense = 0
        for seed, prompt in enumerate(prompts):
            mx.random.seed(seed)
            sampler = SAMPLERS[name](temp)
            for response in stream_generate(
                session, tokenizer, prompt, args.tokens, sampler=sampler, prior=prior or False,
                max_kl=args.max_kl,
            ):  # fmt: skip
                report = response.glass
            assert report is not None
            checked += report.checked_tokens
            drafts += report.drafts
            read += report.read_bytes
            dense += response.generation_tokens * report.dense_bytes
        results[temp, name] = checked, drafts, read / dense
    return results


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("compare_samplers"):
        args = setup_arg_parser().parse_args()
        cells = [
            [f"{temp:g}", name, f"{checked}", f"{drafts / max(checked, 1):.3f}", f"{read:.3f}"]
            for (temp, name), (checked, drafts, read) in compare(args).items()
        ]
        columns = ["temperature", "sampler", "checked tokens", "drafts per token", "bytes"]
        print(markdown_table(columns, cells))


if __name__ == "__main__":
    main()
