"""Answer a prompt with the feed-forward neurons that matter for it.

Takes the flags of `mlx_lm.generate` and a few of its own.
"""

import argparse
import json
import sys
from functools import partial
from itertools import takewhile
from typing import Any

from glass_mlx.chat import encode, encode_rest
from glass_mlx.checkpoints import (
    BUILTIN_DENSITY,
    DEFAULT_MODEL,
    add_load_arguments,
    advice,
    load,
    load_options,
    model_name,
)
from glass_mlx.command import ending
from glass_mlx.engine import AUTO, check, generate
from glass_mlx.hub import locate
from glass_mlx.lookup import NoPriorError, model_folder, resolve_prior
from glass_mlx.models import DOWN_POLICIES, default_down_policy, fingerprint
from glass_mlx.prior import GlobalPrior, cache_name, cached_priors
from glass_mlx.prompt_cache import (
    PromptCache,
    check_name,
    described,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from glass_mlx.slicing import (
    DEFAULT_DENSITY,
    DEFAULT_MIX,
    DEFAULT_PRIOR_STATISTIC,
    DEFAULT_REFRESH,
    DEFAULT_STATISTIC,
    DEFAULT_WARMUP,
)
from glass_mlx.statistics import PRIOR_STATISTICS, STATISTICS

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import setup_arg_parser as mlx_lm_arg_parser
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

# How many tokens a prior that is built on the spot is measured on.
BUILD_TOKENS = 4096

# Flags of mlx_lm.generate that are not combined with slicing.
_REFUSED = ("--draft-model", "--image")


def setup_arg_parser() -> argparse.ArgumentParser:
    """Set up and return the argument parser: mlx-lm's flags and ours."""
    parser = argparse.ArgumentParser(
        prog="glass-mlx",
        description=__doc__,
        parents=[mlx_lm_arg_parser()],
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--model",
        help="The hub id, folder or GGUF file of the model. "
        f"Default: the built-in {DEFAULT_MODEL}, fetched once.",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        help="Number of prompt tokens to process at a time (default: %(default)s).",
    )
    for flag in _REFUSED:
        parser.add_argument(flag, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--num-draft-tokens", help=argparse.SUPPRESS)
    parser.add_argument(
        "--save-prompt-cache",
        metavar="FILE",
        help="Save the prompt cache with the answer in it, for --prompt-cache-file to go on from.",
    )
    add_load_arguments(parser)

    group = parser.add_argument_group("slicing")
    group.add_argument(
        "--density",
        type=_number_or_auto,
        help="Share of the feed-forward neurons to keep, or auto for the lowest that is expected "
        f"to hold --max-kl (default: {DEFAULT_DENSITY}; {BUILTIN_DENSITY} for the built-in model).",
    )
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="With --density auto: KL divergence from the dense model, in nats a token.",
    )
    group.add_argument(
        "--mix",
        type=float,
        default=DEFAULT_MIX,
        help="λ, the weight of the prior's ranking against that of the tokens read "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=DEFAULT_WARMUP,
        metavar="N",
        help="Compute so many tokens densely before neurons are selected (default: %(default)s).",
    )
    group.add_argument(
        "--refresh",
        type=int,
        metavar="N",
        help="Every so many tokens, and later less often, read what was written densely and "
        f"select again; 0 for never (default: {DEFAULT_REFRESH}, with --release-dense 0).",
    )
    group.add_argument(
        "--statistic",
        choices=STATISTICS,
        default=DEFAULT_STATISTIC,
        help="What the tokens read rank neurons by (default: %(default)s).",
    )
    group.add_argument(
        "--prior-statistic",
        choices=PRIOR_STATISTICS,
        default=DEFAULT_PRIOR_STATISTIC,
        help="What the prior ranks neurons by (default: %(default)s).",
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prior",
        metavar="FILE",
        help="The file of the model's global prior, or hub:user/repo, which is fetched. Default: "
        "glass_prior.safetensors in the model's folder, then the user's cache, then the priors of "
        "this package.",
    )
    source.add_argument(
        "--build-prior",
        action="store_true",
        help=f"If there is no prior, measure a small one ({BUILD_TOKENS} tokens) into the user's "
        "cache, and use it.",
    )
    source.add_argument("--no-prior", action="store_true", help="Select by the tokens read alone.")
    source.add_argument("--dense", action="store_true", help="Do not slice, for comparison.")
    group.add_argument(
        "--release-dense",
        action="store_true",
        help="Free the dense feed-forward weights as soon as their slices exist, so that decoding "
        "holds less memory than the dense model does.",
    )
    group.add_argument(
        "--down-policy",
        choices=DOWN_POLICIES,
        default=default_down_policy(),
        help="How quantized down projections are sliced: quantized again or taken from a "
        "neuron-major copy, both with a small error, or kept whole and given zeros, which is exact "
        "and slower (default: neuron-major on a CPU, requantize on Metal).",
    )
    return parser


def _number_or_auto(text: str) -> float | str:
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def _find_prior(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    given: GlobalPrior | None,
) -> GlobalPrior:
    """The model's prior; if there is none and the user asks for it, it is measured now."""
    looked: list[str] = []
    try:
        asked = args.model or DEFAULT_MODEL
        return resolve_prior(model, given, model_folder(tokenizer), asked, looked.append)
    except NoPriorError:
        if not args.build_prior:
            raise
    finally:
        if args.verbose and looked:
            print(f"prior: {'; '.join(looked)}", file=sys.stderr)
    from glass_mlx.calibration import Settings, build

    name = model_name(args.model)
    file = cached_priors() / f"{cache_name(name, fingerprint(model))}.safetensors"
    wanted = (*STATISTICS, args.prior_statistic)
    curve = Settings.curve_texts if args.density == AUTO else 0
    settings = Settings(
        statistics=tuple(dict.fromkeys(wanted)), tokens=BUILD_TOKENS, curve_texts=curve
    )
    print(f"prior: measuring one into {file}", file=sys.stderr)
    build(model, tokenizer, file, settings, name)
    return resolve_prior(model, file)


def _read_prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


def _template_options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        options = json.loads(args.chat_template_config or "{}")
    except ValueError as error:
        raise ValueError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError("--chat-template-config must be a JSON object")
    return options


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    if args.prefill_response is not None:
        messages.append({"role": "assistant", "content": args.prefill_response})
    return messages


def _open_cache(args: argparse.Namespace) -> tuple[PromptCache | None, dict[str, str]]:
    """The prompt cache to go on from, if one is given, and what else is kept in its file.

    As in mlx-lm, its model is the one that is loaded, and is set in `args`.
    """
    if args.prompt_cache_file is None:
        return None, {}
    cache, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    made_by = metadata.get("model")
    if made_by is None:
        raise ValueError(f"the prompt cache {args.prompt_cache_file} does not name its model")
    if args.model is None and made_by != DEFAULT_MODEL:
        args.model = made_by
    if (args.model or DEFAULT_MODEL) != made_by:
        raise ValueError(f"the prompt cache is of the model {made_by}, not of {args.model}")
    first = cache[0]
    if isinstance(first, QuantizedKVCache) and (
        args.kv_bits not in (None, first.bits) or args.kv_group_size != first.group_size
    ):
        raise ValueError(
            f"the prompt cache has {first.bits} bits in groups of {first.group_size}; give these "
            "as --kv-bits and --kv-group-size"
        )
    if args.verbose and cache.evidence is None:
        print(
            "note: there are no statistics beside the prompt cache; neurons are selected by what "
            "is read now (python -m glass_mlx.cache_prompt saves both)",
            file=sys.stderr,
        )
    return cache, metadata


def _in_all(history: list[dict[str, str]], messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """All that was said; the first new message may go on with one that was begun before."""
    if history and history[-1]["role"] == "user":
        *history, begun = history
        first, *rest = messages
        messages = [first | {"content": begun["content"] + first["content"]}, *rest]
    return history + messages


def _new_tokens(
    tokenizer: TokenizerWrapper,
    history: list[dict[str, str]],
    messages: list[dict[str, str]],
    cache: PromptCache | None,
    args: argparse.Namespace,
    template: dict[str, Any],
) -> list[int]:
    """The tokens that the model has not read yet, of all that was said."""
    ignore = args.ignore_chat_template
    if cache is None:
        return encode(tokenizer, messages, ignore, **template)
    if ignore or not tokenizer.has_chat_template:
        return encode_rest(tokenizer, messages, ignore)
    if not history:
        if args.save_prompt_cache:
            raise ValueError(
                "the prompt cache does not tell what was said, so that no conversation can go on "
                "from it; make it with python -m glass_mlx.cache_prompt"
            )
        return encode_rest(tokenizer, messages, **template)
    if args.system_prompt is not None:
        raise ValueError("--system-prompt is for the beginning of a conversation")
    tokens = encode(tokenizer, _in_all(history, messages), **template)
    pairs = zip(cache.tokens, tokens[:-1], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if same < len(cache.tokens):
        cache.trim(len(cache.tokens) - same)
    return tokens[same:]


def _with_answer(messages: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The messages and an answer to them, whose beginning may be the last of them."""
    if messages[-1]["role"] == "assistant":
        *messages, begun = messages
        text = begun["content"] + text
    return [*messages, {"role": "assistant", "content": text}]


def run(args: argparse.Namespace) -> None:
    """Load the model, generate and print.

    Raises:
        FileNotFoundError: if the model, the prior or the prompt cache does not exist.
        ValueError: for a bad value, a model that cannot be used or a prior that does not fit.
    """
    for flag in _REFUSED:
        if getattr(args, flag[2:].replace("-", "_")):
            raise ValueError(f"{flag} cannot be combined with slicing; use mlx_lm.generate")
    if args.save_prompt_cache:
        check_name(args.save_prompt_cache)
        if args.dense:
            raise ValueError("--save-prompt-cache cannot be combined with --dense")
    prompt, template = _read_prompt(args), _template_options(args)
    cache, metadata = _open_cache(args)
    density = args.density
    if density is None:
        density = BUILTIN_DENSITY if args.model is None else DEFAULT_DENSITY
    refresh = args.refresh
    if refresh is None:  # a released model would be loaded again for every renewal
        refresh = 0 if args.release_dense else DEFAULT_REFRESH
    options = {
        "density": density,
        "max_kl": args.max_kl,
        "mix": args.mix,
        "warmup": args.warmup,
        "refresh": refresh,
        "statistic": args.statistic,
        "prior_statistic": args.prior_statistic,
        "down_policy": args.down_policy,
    }
    check(max_tokens=args.max_tokens, **options)
    prior = GlobalPrior.load(locate(args.prior)) if args.prior else None

    if args.seed is not None:
        mx.random.seed(args.seed)
    tokenizer_config = json.loads(metadata.get("tokenizer_config", "{}"))
    load_again = partial(
        load,
        args.model,
        model_config={"quantize_activations": args.quantize_activations},
        **load_options(args, tokenizer_config),
    )
    model, tokenizer = load_again()
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    if args.verbose and (hint := advice(model)):
        print(hint, file=sys.stderr)
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
    history, messages = json.loads(metadata.get("messages", "[]")), _messages(args, prompt)
    tokens = _new_tokens(tokenizer, history, messages, cache, args, template)
    if cache is None and args.save_prompt_cache:
        cache = make_prompt_cache(model, args.max_kv_size)
    common = {
        "max_tokens": args.max_tokens,
        "verbose": args.verbose,
        "sampler": sampler,
        "max_kv_size": args.max_kv_size,
        "prefill_step_size": args.prefill_step_size,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "prompt_cache": cache,
    }
    if args.dense:
        text = mlx_lm.generate(model, tokenizer, tokens, **common)
    else:
        if not args.no_prior:
            prior = _find_prior(args, model, tokenizer, prior)
        text = generate(
            model,
            tokenizer,
            tokens,
            prior=False if args.no_prior else prior,
            reload=(lambda: load_again(lazy=True)[0]) if args.release_dense else None,
            **options,
            **common,
        )
    if not args.verbose:
        print(text)
    if args.save_prompt_cache:
        about = described(args.model, tokenizer_config)
        if tokenizer.has_chat_template and not args.ignore_chat_template:
            said = _with_answer(_in_all(history, messages), text)
            about["messages"] = json.dumps(said)
        save_prompt_cache(args.save_prompt_cache, cache, about)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    args = setup_arg_parser().parse_args()
    with ending("glass-mlx"):
        run(args)


if __name__ == "__main__":
    main()
