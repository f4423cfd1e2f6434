"""Measure the perplexity of a text, dense and sliced.

Accepts the flags of `mlx_lm.perplexity` and some more. The sliced model reads the text as if it had
written it: dense in the warm-up, on slices afterwards.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("perplexity")

import argparse
import math
import time
from pathlib import Path
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_adapter_arguments,
    add_load_arguments,
    add_model_argument,
    check_minimums,
)
from glass_mlx.calibration.first_use import make_selector
from glass_mlx.calibration.texts import read_documents
from glass_mlx.chat_templates import encode, encode_text
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.command_model import find_prior, load_session
from glass_mlx.config import GlassConfig, check_seed
from glass_mlx.errors import exit_on_error, is_library_error, library_reason
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, Scores, score
from glass_mlx.files import expand_user
from glass_mlx.prior.lookup import given_prior
from glass_mlx.session import Session
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from

import mlx.core as mx
import numpy as np
from mlx_lm.perplexity import load_data
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(
        prog="glass-mlx", usage="glass-mlx perplexity [flags]", description=__doc__
    )
    add_model_argument(parser)
    add_adapter_arguments(parser)
    add_load_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=512,
        help="Length of each sample in tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=256,
        help="Number of samples to use, -1 for all (default: %(default)s).",
    )
    parser.add_argument(
        "--data-path",
        default="allenai/tulu-3-sft-mixture",
        help="A Hugging Face dataset, or a file: text, or JSONL with text or messages (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=123,
        help="Seed that chooses the samples (default: %(default)s).",
    )
    add_slicing_arguments(parser.add_argument_group("slicing"))
    return parser


def check_flags(args: argparse.Namespace) -> GlassConfig:
    """Check the flags, and return how the model is sliced.

    Raises:
        ValueError: for the first value that is out of range or of no use here.
    """
    if args.release_dense:
        raise ValueError("--release-dense is of no use here: every sample needs the dense weights")
    check_minimums(args, sequence_length=4)
    if args.num_samples < 1 and args.num_samples != -1:
        raise ValueError(f"--num-samples must be at least 1, or -1, not {args.num_samples}")
    check_seed(args.seed)
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be below 2^32, not {args.seed}")
    return config_from(args)


def load_samples(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> list[list[int]]:
    """Return the samples, each of `--sequence-length` token ids.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file or the dataset cannot be used, or is too short.
    """
    length, count = args.sequence_length, args.num_samples
    file = expand_user(args.data_path)
    if file.exists():
        samples = _read_file(file, tokenizer, length, count)
    elif file.is_absolute() or args.data_path.startswith((".", "~")):
        raise FileNotFoundError(f"there is no data at {args.data_path}")
    else:
        try:
            samples = load_data(tokenizer, args.data_path, count, length).tolist()
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise ValueError(
                f"the dataset {args.data_path} cannot be used: {library_reason(error)}"
            ) from error
    if not samples:
        raise ValueError(f"{args.data_path} has fewer than {length} tokens")
    return samples


def _read_file(file: Path, tokenizer: TokenizerWrapper, length: int, count: int) -> list[list[int]]:
    """Return the tokens of a file's documents, in random order, one after the other, cut."""
    documents, tokens = [*read_documents(file)], list[int]()
    for number in np.random.permutation(len(documents)):
        if 0 < count * length <= len(tokens):
            break
        document = documents[number]
        if isinstance(document, str):
            tokens += encode_text(tokenizer, document, add_special_tokens=True)
        else:
            tokens += encode(tokenizer, document)
    samples = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    return samples[:count] if count > 0 else samples


def measure(
    session: Session,
    samples: list[list[int]],
    selector: Any,
) -> tuple[list[Scores], list[Scores]]:
    """Score samples.

    Args:
        session: the model's session.
        samples: the token ids of each sample. The first token is the prompt.
        selector: chooses what is kept, or None to score the dense model alone.

    Returns:
        The scores of the dense and of the sliced model on each sample.
    """
    dense, sliced = [], []
    points = (1,) if selector is None else (selector.config.warmup,)
    for tokens in tqdm(samples, desc="perplexity", unit="sample"):
        reading = DenseReading(session, Continuation(tokens[:1], tokens[1:]), points)
        dense.append(Scores.exact(reading))
        if selector is not None:
            sliced.append(score(reading, selector))
    return dense, sliced


def perplexity(scores: list[Scores]) -> tuple[float, float]:
    """Return the perplexity of scored tokens and its standard error, as mlx-lm does."""
    losses = np.concatenate([one.nll for one in scores])
    value = math.exp(losses.mean())
    return value, value * float(losses.std(ddof=1)) / math.sqrt(len(losses))


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        FileNotFoundError: if the model, the prior or the data does not exist.
        ValueError: for a bad value, a model that cannot be used or data that cannot be read.
    """
    config = check_flags(args)
    given = given_prior(args.prior)
    np.random.seed(args.seed)
    mx.random.seed(args.seed)
    session, tokenizer = load_session(args)
    samples = load_samples(args, tokenizer)
    for sample in samples:
        session.check_tokens(sample)
    prior = find_prior(args, session, tokenizer, given, config)
    selector = None if args.dense else make_selector(session, tokenizer, prior, config)
    start = time.perf_counter()
    dense, sliced = measure(session, samples, selector)
    print(f"Model: {args.model or DEFAULT_MODEL}")
    print("Dense perplexity: {:.3f} ± {:.3f}".format(*perplexity(dense)))
    if sliced:
        _print_sliced(sliced)
    print(f"Samples: {len(samples)} of {args.sequence_length} tokens")
    print(f"Evaluation time: {time.perf_counter() - start:.2f} seconds")
    print(f"Peak memory: {mx.get_peak_memory() / 1e9:.2f} GB")


def _print_sliced(scores: list[Scores]) -> None:
    """Print how the sliced model compares to the dense one."""
    kl, agrees, read = (
        np.concatenate([getattr(one, name) for one in scores]) for name in ("kl", "agrees", "bytes")
    )
    error = kl.std(ddof=1) / math.sqrt(len(kl))
    print("Sliced perplexity: {:.3f} ± {:.3f}".format(*perplexity(scores)))
    print(f"KL from the dense model: {kl.mean():.4f} ± {error:.4f} nats per token")
    print(f"Same most likely token: {100 * agrees.mean():.2f} %")
    print(f"Bytes of weights read: {100 * read.mean():.1f} % of the dense model's")


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
