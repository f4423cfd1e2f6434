"""Serve a model over HTTP, with the endpoints of OpenAI's API and a page to try it.

Accepts the flags of `mlx_lm.server` and some more.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("server")

import argparse
import json
import logging
import os
import sys
from functools import partial
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_adapter_arguments,
    add_draft_arguments,
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    check_cache_flags,
    check_minimums,
    check_one_machine,
    check_sampling_flags,
    division_options,
)
from glass_mlx.config import GlassConfig
from glass_mlx.errors import INTERRUPTED, exit_on_error
from glass_mlx.models import world
from glass_mlx.server.generation import GlassResponseGenerator
from glass_mlx.server.handler import GlassAPIHandler
from glass_mlx.server.listener import Listener
from glass_mlx.server.provider import GlassModelProvider
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from

import mlx_lm.server
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import get_system_fingerprint
from mlx_lm.utils import _parse_size

# Flags that cannot be combined with slicing, or that a server cannot use.
_REFUSED = {
    "release_dense": "--release-dense is of no use here: the next prompt needs the dense weights",
}

# Flags whose effect could differ between machines, or that mlx-lm refuses for a divided model.
_OF_ONE_MACHINE = ("adapter_path", "allow_model_requests", "draft_model", "prompt_cache_bytes")

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(prog="glass-mlx", usage="glass-mlx server [flags]", description=__doc__)
    add_model_argument(parser)
    add_adapter_arguments(parser)
    add_load_arguments(parser)
    add_draft_arguments(parser)
    add_pipeline_argument(parser)
    _add_http_arguments(parser.add_argument_group("connections"))
    _add_default_arguments(parser.add_argument_group("defaults of requests"))
    _add_cache_arguments(parser.add_argument_group("prompt caches"))
    add_slicing_arguments(parser.add_argument_group("slicing"))
    for flag in ("--decode-concurrency", "--prompt-concurrency"):
        parser.add_argument(flag, help=argparse.SUPPRESS, type=int)
    return parser


def _add_http_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="The address to listen on (default: %(default)s, for this machine alone).",
    )
    group.add_argument(
        "--port", type=int, default=8080, help="The port to listen on (default: %(default)s)."
    )
    group.add_argument(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default="*",
        help="Origins of web pages that may use the server (default: %(default)s).",
    )
    group.add_argument(
        "--allow-model-requests",
        action="store_true",
        help="Load whatever model or adapters a request names, from the hub or from a folder of "
        "this machine. Without this flag only --model is served.",
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        metavar="N",
        help="Number of requests that may wait; more are refused (default: %(default)s).",
    )
    group.add_argument(
        "--max-request-bytes",
        type=_size,
        default=4_000_000,
        metavar="SIZE",
        help="Largest request that is read, such as 4MB (default: %(default)s).",
    )
    group.add_argument(
        "--log-level",
        choices=_LEVELS,
        default="INFO",
        help="What is logged (default: %(default)s).",
    )


def _add_default_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temp", type=float, default=0.0, help="Sampling temperature (default: %(default)s)."
    )
    group.add_argument("--top-p", type=float, default=1.0, help="Top-p (default: %(default)s).")
    group.add_argument("--top-k", type=int, default=0, help="Top-k (default: off).")
    group.add_argument("--min-p", type=float, default=0.0, help="Min-p (default: off).")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="Maximum number of tokens to generate (default: %(default)s).",
    )
    group.add_argument("--chat-template", default="", help="A chat template for the tokenizer.")
    group.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Use the tokenizer's default chat template if the model has none.",
    )
    group.add_argument(
        "--chat-template-args",
        type=_json_object,
        default="{}",
        metavar="JSON",
        help="""Options of the chat template, such as '{"enable_thinking": false}'.""",
    )


def _add_cache_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt-cache-size",
        type=int,
        default=10,
        help="Number of prompt caches to keep; 0 for none (default: %(default)s).",
    )
    group.add_argument(
        "--prompt-cache-bytes", type=_size, help="Size of all prompt caches, such as 2GB."
    )
    group.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        help="Number of prompt tokens to process at a time (default: %(default)s).",
    )
    group.add_argument(
        "--max-kv-size", type=int, help="Maximum size of the key-value cache, in tokens."
    )
    group.add_argument("--kv-bits", type=int, help="Bits of a quantized key-value cache.")
    group.add_argument(
        "--kv-group-size",
        type=int,
        default=64,
        help="Group size of a quantized key-value cache (default: %(default)s).",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=DEFAULT_QUANTIZED_KV_START,
        help="Number of tokens after which the cache is quantized (default: %(default)s).",
    )


def _size(text: str) -> int:
    """Return a size in bytes."""
    try:
        return int(_parse_size(text))
    except (ArithmeticError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4MB") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return value


def check_flags(args: argparse.Namespace) -> GlassConfig:
    """Check the flags, and return how answers are sliced.

    Raises:
        ValueError: for the first value that is out of range.
    """
    if not hasattr(mlx_lm.server, "TextStateMachine"):
        raise ValueError("the server needs mlx-lm 0.32 or newer, which needs Python 3.11 or newer")
    division_options(args)
    check_one_machine(args, *_OF_ONE_MACHINE)
    for name, reason in _REFUSED.items():
        if getattr(args, name):
            raise ValueError(reason)
    args.min_tokens_to_keep, args.xtc_probability, args.xtc_threshold = 1, 0.0, 0.0
    check_sampling_flags(args)
    check_cache_flags(args)
    if args.kv_bits is not None and args.max_kv_size is not None:
        raise ValueError(
            "--kv-bits cannot be combined with --max-kv-size; mlx-lm has no such cache"
        )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, not {args.port}")
    check_minimums(
        args,
        max_tokens=1,
        max_waiting=1,
        max_request_bytes=1,
        prefill_step_size=1,
        prompt_cache_size=0,
        num_draft_tokens=0,
    )
    return config_from(args)


def start(args: argparse.Namespace) -> tuple[Listener | None, GlassResponseGenerator]:
    """Load the model, and return the listener, which answers once `serve_forever` is called.

    Of several ranks, only rank 0 listens.

    Args:
        args: the parsed flags.

    Raises:
        OSError: if the address cannot be listened on.
        ValueError: for a bad flag, a model that cannot be used or a prior that does not fit.
    """
    provider = GlassModelProvider(args, check_flags(args))
    is_first = world().is_first
    listener = Listener(args.host, args.port, args.max_waiting) if is_first else None
    cache_bytes = 1 << 63 if args.prompt_cache_bytes is None else args.prompt_cache_bytes
    generator = GlassResponseGenerator(
        provider, LRUPromptCache(args.prompt_cache_size, cache_bytes), args.max_waiting
    )
    while not provider.ready.wait(0.5):  # without a time limit, an interrupt would have to wait
        pass
    if provider.failure is not None:
        generator.end_thread()
        if listener is not None:
            listener.server_close()
        raise provider.failure
    if listener is not None:
        listener.handle_with(
            partial(GlassAPIHandler, generator, system_fingerprint=get_system_fingerprint())
        )
        listener.server_activate()
    return listener, generator


def run(args: argparse.Namespace) -> None:
    """Serve until an interrupt.

    Raises:
        OSError: if the address cannot be listened on.
        ValueError: for a bad flag, a model that cannot be used or a prior that does not fit.
    """
    logging.basicConfig(
        level=getattr(logging, args.log_level), format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        listener, generator = start(args)
    except KeyboardInterrupt:
        # The thread that loads or measures cannot be stopped, and a measurement can be resumed.
        os._exit(INTERRUPTED)
    if listener is None:
        generator.join()
        return
    print(f"serving {generator.model_provider.name} at {listener.url}", file=sys.stderr)
    try:
        listener.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        listener.server_close()
        generator.stop_and_join()


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
