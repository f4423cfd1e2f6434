"""Answer a prompt with the feed-forward neurons that matter for the prompt.

Accepts the flags of `mlx_lm.generate` and some more.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("generate")

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from glass_mlx.arguments import (
    CommandParser,
    add_draft_arguments,
    add_load_arguments,
    add_model_argument,
    add_pipeline_argument,
    check_cache_flags,
    check_minimums,
    check_one_machine,
    check_sampling_flags,
    draft_options,
    load_options,
    path,
)
from glass_mlx.cache_file import check_name
from glass_mlx.chat_templates import RESERVED_OPTIONS, Messages
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.checkpoints.loading import load, load_draft
from glass_mlx.command_model import find_prior, note_advice
from glass_mlx.config import GlassConfig, check_seed
from glass_mlx.conversation import Conversation, full_history, with_answer
from glass_mlx.errors import exit_on_error, read_standard_input
from glass_mlx.generation_report import summary
from glass_mlx.models import check_tokens, vocabulary_size, world
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prior.lookup import given_prior
from glass_mlx.prompt_cache import make_layers, make_prompt_cache
from glass_mlx.sampling import make_sampler
from glass_mlx.session import Session
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from
from glass_mlx.speculation import Drafting
from glass_mlx.streaming import check_max_tokens, collect, stream_generate

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import setup_arg_parser as mlx_lm_arg_parser
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Flags of mlx_lm.generate that cannot be combined with slicing.
_REFUSED = ("--image",)


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(
        prog="glass-mlx",
        usage="glass-mlx generate [flags]",
        description=__doc__,
        parents=[mlx_lm_arg_parser()],
        conflict_handler="resolve",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        help="Number of prompt tokens to process at a time (default: %(default)s).",
    )
    for flag in _REFUSED:
        parser.add_argument(flag, nargs="+", help=argparse.SUPPRESS)
    add_draft_arguments(parser)
    parser.add_argument(
        "--save-prompt-cache",
        metavar="FILE",
        help="Save the prompt cache, with the answer in it, for a later --prompt-cache-file. "
        "Nothing is saved if the answer is interrupted, also by a pipe whose reader leaves.",
    )
    add_load_arguments(parser)
    add_pipeline_argument(parser)
    add_slicing_arguments(parser.add_argument_group("slicing"))
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model, generate and print.

    Raises:
        FileNotFoundError: if the model, the prior or the prompt cache does not exist.
        ValueError: for a bad value, a model that cannot be used or a prior that does not fit.
    """
    # 1) Check the input before anything is loaded.
    _check_flags(args)
    messages, template_options = _messages(args), _template_options(args)
    conversation = _open_conversation(args)
    config = config_from(args)
    prior = given_prior(args.prior)

    # 2) Load the model.
    if args.seed is not None:
        mx.random.seed(args.seed)
    load_model = _loader(args, conversation)
    model, tokenizer = load_model()
    draft_model = load_draft(args.draft_model, tokenizer, **draft_options(args))
    for token in args.extra_eos_token:
        _add_eos_token(model, tokenizer, token)
    if args.verbose:
        note_advice(model)

    # 3) Encode the new messages.
    if args.verbose and not _uses_template(args, tokenizer):
        _note_unused_messages(messages)
    tokens = conversation.unread_tokens(
        model,
        tokenizer,
        messages,
        args.ignore_chat_template,
        bool(args.save_prompt_cache),
        template_options,
    )
    if conversation.cache is None and args.save_prompt_cache:
        conversation.cache = make_prompt_cache(model, args.max_kv_size, draft_model)

    # 4) Generate.
    options = _generation_options(args, tokenizer)
    options |= {"prompt_cache": conversation.cache, "draft_model": draft_model}
    response = None
    if args.dense:
        text = _generate_dense(args, model, tokenizer, tokens, options)
    else:
        session = Session.of(model)
        responses = stream_generate(
            session,
            tokenizer,
            tokens,
            config=config,
            prior=_find_prior(args, session, tokenizer, prior, config) or False,
            reload=(lambda: load_model(lazy=True)[0]) if args.release_dense else None,
            **options,
        )
        text, response = collect(responses, args.verbose)
    if not args.verbose:
        print(text)

    # 5) Save the conversation, before a closing line that can fail is printed.
    if args.save_prompt_cache:
        messages = with_answer(full_history(conversation.history, messages), text)
        history = messages if _uses_template(args, tokenizer) else None
        conversation.save(args.save_prompt_cache, args.model, history)
    if response is not None and args.verbose:
        print(summary(response))


def _uses_template(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> bool:
    """Return whether messages go through a chat template."""
    return tokenizer.has_chat_template and not args.ignore_chat_template


def _generate_dense(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    options: dict[str, Any],
) -> str:
    """Generate with mlx-lm, and return the text.

    Raises:
        ValueError: if mlx-lm could not take drafts back, which it would not notice.
    """
    draft_model = options["draft_model"]
    if options["prompt_cache"] is None:
        options["prompt_cache"] = make_layers(model, args.max_kv_size, draft_model)
    if draft_model is not None:
        drafting = Drafting(draft_model, args.num_draft_tokens)
        drafting.check_cache(model, options["prompt_cache"], len(tokens) + args.max_tokens)
    return mlx_lm.generate(model, tokenizer, tokens, verbose=args.verbose, **options)


def _loader(args: argparse.Namespace, conversation: Conversation) -> Callable[..., Any]:
    """Return a function that loads the model and its tokenizer."""
    return partial(
        load,
        args.model,
        model_config={"quantize_activations": args.quantize_activations},
        **load_options(args, conversation.tokenizer_config),
    )


def _note_unused_messages(messages: Messages) -> None:
    """Say that messages have no effect without a chat template, as in mlx-lm."""
    if len(messages) > 1:
        print(
            "note: --system-prompt and --prefill-response have no effect without a chat template",
            file=sys.stderr,
        )


def _add_eos_token(model: nn.Module, tokenizer: TokenizerWrapper, token: str) -> None:
    """Add a token that ends the text, given by its text or its id.

    Raises:
        ValueError: if the model does not have the token.
    """
    if token.isdecimal():
        check_tokens([int(token)], vocabulary_size(model))
    else:  # tokenizers return the id of the unknown token for all others
        identifier = tokenizer.convert_tokens_to_ids(token)
        if identifier is None or tokenizer.convert_ids_to_tokens(identifier) != token:
            raise ValueError(f"--extra-eos-token {token} is not a token of this model")
    tokenizer.add_eos_token(token)


def _check_flags(args: argparse.Namespace) -> None:
    for flag in _REFUSED:
        if getattr(args, flag[2:].replace("-", "_")):
            raise ValueError(f"{flag} cannot be combined with slicing; use mlx_lm.generate")
    if world().size > 1:
        _check_ranks(args)
    if args.save_prompt_cache:
        check_name(args.save_prompt_cache)
        if args.dense:
            raise ValueError("--save-prompt-cache cannot be combined with --dense")
    check_max_tokens(args.max_tokens)
    check_cache_flags(args)
    check_sampling_flags(args)
    check_minimums(args, prefill_step_size=1, num_draft_tokens=0)
    if args.dense and args.draft_model and args.max_tokens < 0:
        raise ValueError("--max-tokens -1 cannot be combined with --dense and --draft-model")
    if args.seed is not None:
        check_seed(args.seed)


def _check_ranks(args: argparse.Namespace) -> None:
    """Check that nothing is asked for that several machines cannot do."""
    check_one_machine(args, "save_prompt_cache", "prompt_cache_file", "adapter_path", "draft_model")
    if args.prompt == "-":
        raise ValueError("mlx.launch never ends standard input; give the prompt with --prompt")


def _messages(args: argparse.Namespace) -> Messages:
    """Return the new messages: the prompt, a system prompt and the beginning of an answer."""
    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = read_standard_input() if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    if args.prefill_response is not None:
        messages.append({"role": "assistant", "content": args.prefill_response})
    return messages


def _template_options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        options = json.loads(args.chat_template_config or "{}")
    except ValueError as error:
        raise ValueError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError("--chat-template-config must be a JSON object")
    if reserved := sorted(RESERVED_OPTIONS & options.keys()):
        raise ValueError(
            f"--chat-template-config cannot set {', '.join(reserved)}, which glass-mlx sets itself"
        )
    return options


def _open_conversation(args: argparse.Namespace) -> Conversation:
    """Open the conversation to continue, or a new one.

    As in mlx-lm, the model that the prompt cache names is loaded. Its name is stored in `args`.
    """
    if args.prompt_cache_file is None:
        return Conversation()
    conversation = Conversation.load(str(path(args.prompt_cache_file)))
    cached_model, cache = conversation.model, conversation.cache
    assert cache is not None
    if args.model is None and cached_model != DEFAULT_MODEL:
        args.model = cached_model
    if (args.model or DEFAULT_MODEL) != cached_model:
        raise ValueError(f"the prompt cache is of the model {cached_model}, not of {args.model}")
    first = cache[0]
    if isinstance(first, QuantizedKVCache) and (
        args.kv_bits not in (None, first.bits) or args.kv_group_size != first.group_size
    ):
        raise ValueError(
            f"the prompt cache has {first.bits} bits in groups of {first.group_size}; give these "
            "as --kv-bits and --kv-group-size"
        )
    if args.verbose and cache.statistics is None:
        print(
            "note: there are no statistics beside the prompt cache; neurons are selected from the "
            "new tokens alone (python -m glass_mlx.cache_prompt saves both)",
            file=sys.stderr,
        )
    return conversation


def _generation_options(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Return the options that `glass_mlx.generate` and `mlx_lm.generate` have in common."""
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    return {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "max_kv_size": args.max_kv_size,
        "prefill_step_size": args.prefill_step_size,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "num_draft_tokens": args.num_draft_tokens,
    }


def _find_prior(
    args: argparse.Namespace,
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior | None,
    config: GlassConfig,
) -> GlobalPrior | None:
    """Return the model's prior or None, and report where it comes from."""
    places_searched: list[str] = []
    try:
        return find_prior(args, session, tokenizer, prior, config, places_searched.append)
    finally:
        if args.verbose and places_searched:
            print(f"prior: {'; '.join(places_searched)}", file=sys.stderr)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
