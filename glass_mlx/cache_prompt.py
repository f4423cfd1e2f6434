"""Read a prompt once, and save its cache and neuron statistics for many questions.

The command accepts the flags of `mlx_lm.cache_prompt`, and both mlx-lm and glass-mlx can load the
files that it writes.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("cache_prompt")

import argparse
import sys

from glass_mlx.arguments import (
    CommandParser,
    add_load_arguments,
    add_model_argument,
    check_cache_flags,
    load_options,
)
from glass_mlx.cache_file import check_name
from glass_mlx.chat_templates import encode_beginning
from glass_mlx.checkpoints.loading import load
from glass_mlx.conversation import Conversation
from glass_mlx.errors import exit_on_error, read_standard_input
from glass_mlx.prompt_cache import make_prompt_cache, read_prompt

import mlx.core as mx
from mlx_lm.cache_prompt import setup_arg_parser as mlx_lm_arg_parser
from tqdm import tqdm


def setup_arg_parser() -> CommandParser:
    """Return the argument parser: mlx-lm's flags, and those for loading a model."""
    parser = CommandParser(
        description=__doc__,
        parents=[mlx_lm_arg_parser()],
        conflict_handler="resolve",
    )
    add_model_argument(parser)
    add_load_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the prompt and save its cache.

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: for a bad value or a model that cannot be used.
    """
    file = check_name(args.prompt_cache_file)
    check_cache_flags(args)
    prompt = read_standard_input() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    tokenizer_config = {} if args.eos_token is None else {"eos_token": args.eos_token}
    model, tokenizer = load(args.model, **load_options(args, tokenizer_config))
    tokens = encode_beginning(tokenizer, prompt)
    cache = make_prompt_cache(model, args.max_kv_size)
    with tqdm(total=len(tokens), unit="token", file=sys.stderr) as bar:
        read_prompt(
            model,
            tokens,
            cache,
            lambda done, _: bar.update(done - bar.n),
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
        )
    messages = [{"role": "user", "content": prompt}] if tokenizer.has_chat_template else None
    conversation = Conversation(cache, tokenizer_config=tokenizer_config)
    conversation.save(file, args.model, messages)
    size = file.stat().st_size / 1e6
    print(f"{file}: {len(tokens)} tokens, {size:.1f} MB; peak {mx.get_peak_memory() / 1e9:.3f} GB")


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("cache_prompt"):
        run(setup_arg_parser().parse())
