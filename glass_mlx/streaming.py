"""Text in, text out: `stream_generate` and `generate`, with mlx-lm's signatures."""

import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from glass_mlx.block_decoding import CacheQuantization
from glass_mlx.calibration.first_use import find_needed_prior, make_selector
from glass_mlx.chat_templates import Messages, encode, encode_text, is_message
from glass_mlx.checked_decoding import CheckedDecoder
from glass_mlx.config import CONFIG_FIELDS, GlassConfig
from glass_mlx.decoding import Decoder
from glass_mlx.engine import Generation, Step
from glass_mlx.generation_report import GenerationResponse, summary
from glass_mlx.kept_tokens import biased_tokens
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prompt_cache import PromptCache, check_layers, make_layers, trim_to_shared
from glass_mlx.selection import Selector
from glass_mlx.session import Session
from glass_mlx.speculation import DEFAULT_DRAFT_TOKENS, Drafting, SpeculativeDecoder
from glass_mlx.statistics import MIN_GENERATED_TOKENS

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

_NOT_FINITE = (
    "the model computes probabilities that are not a number; its files are damaged, or its dtype "
    "cannot represent its activations"
)

Tokenizer = TokenizerWrapper | PreTrainedTokenizerBase


def stream_generate(
    model: nn.Module | Session,
    tokenizer: Tokenizer,
    prompt: str | mx.array | list[int] | None = None,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    messages: Messages | None = None,
    config: GlassConfig | None = None,
    prior: GlobalPrior | str | Path | Literal[False] | None = None,
    reload: Callable[[], nn.Module] | None = None,
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text with the neurons and the vocabulary that matter for the prompt.

    By default, the text is the dense model's own. A slice of the head drafts tokens, and the whole
    head checks several of them at once. With a bound on KL above 0 or a density, the dense model
    reads the prompt and computes the first tokens, and a model that is sliced for this text
    computes the others, except for every fourth token. The dense model is observed there, and the
    slices are renewed at intervals. The given model's weights do not change.

    Args:
        model: a model from `load` or from `mlx_lm.load`, or a `Session` of one.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        messages: instead of a prompt, all messages of a conversation, as a list of {"role",
            "content"}, which go through the chat template. With a `prompt_cache` from
            `glass_mlx.make_prompt_cache`, only the part that is not in the cache is read, and what
            the cache holds beyond the messages is trimmed from it.
        max_tokens: the maximum number of tokens to generate; -1 for no limit.
        draft_model: a small model with the same tokenizer, for speculative decoding: it drafts
            tokens, and one pass of the sliced model, or of the dense one, checks them. A
            `prompt_cache` must then have the entries of both models, the draft model's last, as
            from `glass_mlx.make_prompt_cache(model, draft_model=draft_model)`.
        config: how to slice. Default: `GlassConfig()`.
        prior: a prior, its file or `hub:user/repo`; None to search for it (see `resolve_prior`)
            and to measure a small one if there is none, which shows its progress on standard
            error; False to select neurons from the local statistics alone.
        reload: loads the model once more without evaluating its arrays, as in
            `lambda: load(name, lazy=True)[0]`. If it is given, the dense weights of each FFN are
            released as soon as its slice exists. When they are needed again, they are loaded from
            the model's files. This saves memory, but every dense token and every renewal loads
            the weights, so it goes with `dense_every=0` and `refresh=0`.
        num_draft_tokens: the number of tokens that the draft model drafts at once.
        **kwargs: fields of `GlassConfig`, such as `density`, which replace those of `config`. All
            others are passed on to `mlx_lm.generate.generate_step`. With a `prompt_cache` from
            `glass_mlx.make_prompt_cache` only the new tokens are read, and the statistics of
            earlier turns count, too; with a cache from mlx-lm only the new tokens count.

    Yields:
        mlx-lm's responses, with a `Report` in `glass`.

    Raises:
        FileNotFoundError: if the prior's file does not exist.
        ValueError: for a value out of range, an empty prompt, a model that cannot be sliced, or a
            prior that is damaged, of another model or cannot be measured.
    """
    tokenizer = _wrapped(tokenizer)
    config = _pop_config(config, kwargs)
    check_max_tokens(max_tokens)
    drafting = None if draft_model is None else Drafting(draft_model, num_draft_tokens)
    tokens = _encode(tokenizer, prompt, messages, kwargs.get("prompt_cache"))
    if tokens.size == 0 and kwargs.get("input_embeddings") is None:
        raise ValueError("the prompt is empty")
    if prior is False and not config.is_exact:
        _check_statistics(tokens, kwargs.get("prompt_cache"), config)
    session, model_prior = Session.of(model), None
    session.check_tokens(cast(list[int], tokens.tolist()))
    if drafting is not None:
        _check_drafting(drafting, session.model, tokens.size, max_tokens, kwargs)
    detokenizer = new_detokenizer(tokenizer)
    if prior is not False:
        model_prior = find_needed_prior(session, tokenizer, prior, config)
    biased = biased_tokens(kwargs.get("logits_processors") or ())
    selector = make_selector(session, tokenizer, model_prior, config, biased)
    if reload is not None and selector.is_exact:
        raise ValueError(
            "with this bound on KL no FFN is sliced, so no dense weights can be released; give a "
            "larger bound (--max-kl, max_kl), or a density"
        )
    steps = _steps(session, selector, tokens, max_tokens, reload, drafting, **kwargs)
    return _responses(steps, session.model, tokenizer, detokenizer, tokens.size, max_tokens)


def _pop_config(config: GlassConfig | None, kwargs: dict[str, Any]) -> GlassConfig:
    """Take the fields of `GlassConfig` out of keyword arguments, and put them into a config.

    Args:
        config: the configuration to change. Default: `GlassConfig()`.
        kwargs: keyword arguments.
    """
    changes = {name: kwargs.pop(name) for name in CONFIG_FIELDS if name in kwargs}
    if changes.get("down_policy", "") is None:
        del changes["down_policy"]
    return replace(config or GlassConfig(), **changes)


def check_max_tokens(max_tokens: int) -> None:
    """Raise ValueError if a number of tokens cannot be generated."""
    if max_tokens < 1 and max_tokens != -1:
        raise ValueError(
            "the number of tokens to generate must be at least 1, or -1 for no limit, not "
            f"{max_tokens}"
        )


def _check_statistics(tokens: mx.array, cache: list[Any] | None, config: GlassConfig) -> None:
    """Raise ValueError if the first selection would rest on a single token."""
    read_before = getattr(cache, "tokens", ())
    if len(read_before) + tokens.size == 1 and config.warmup <= MIN_GENERATED_TOKENS:
        raise ValueError("a prompt of one token does not tell which neurons matter; use a prior")


def _check_drafting(
    drafting: Drafting, model: nn.Module, new: int, max_tokens: int, options: dict[str, Any]
) -> None:
    """Raise ValueError if a generation with drafts, of so many new tokens, cannot be carried out.

    Args:
        drafting: the draft model.
        model: the model.
        new: the number of tokens to read.
        max_tokens: the maximum number of tokens to generate, or -1.
        options: the options of the generation.
    """
    if options.get("input_embeddings") is not None:
        raise ValueError("a draft model cannot read input embeddings; leave it out")
    cache = options.get("prompt_cache")
    cache = cache or make_layers(model, options.get("max_kv_size"), drafting.model)
    drafting.check_cache(model, cache, math.inf if max_tokens < 0 else new + max_tokens)


def _wrapped(tokenizer: Tokenizer) -> TokenizerWrapper:
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def new_detokenizer(tokenizer: TokenizerWrapper) -> StreamingDetokenizer:
    """Return a detokenizer for a new text. Ids without a token are decoded to nothing.

    Raises:
        ValueError: if the vocabulary has tokens that are not text.
    """
    try:
        detokenizer = tokenizer.detokenizer
    except Exception as error:  # from mlx-lm, which reads the whole vocabulary
        raise ValueError("the tokenizer's vocabulary is damaged") from error
    if None in (tokens := getattr(detokenizer, "tokenmap", ())):
        detokenizer.tokenmap = [token or "" for token in tokens]
    return detokenizer


def _encode(
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int] | None,
    messages: Messages | None = None,
    cache: list[Any] | None = None,
) -> mx.array:
    """Return the token ids (T,) to read. Text that starts with BOS gets no second BOS."""
    if (prompt is None) == (messages is None):
        raise ValueError("give either a prompt or messages")
    if prompt is None:
        assert messages is not None
        return mx.array(_unread(tokenizer, messages, cache), mx.uint32)
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        add_special_tokens = bos is None or not prompt.startswith(bos)
        return mx.array(encode_text(tokenizer, prompt, add_special_tokens), mx.uint32)
    return mx.array(prompt, mx.uint32)


def _unread(tokenizer: TokenizerWrapper, messages: Messages, cache: list[Any] | None) -> list[int]:
    """Return the token ids of messages that are not in a prompt cache, which is trimmed to them."""
    if not messages or not all(map(is_message, messages)):
        raise ValueError("messages must be a list of roles and contents, and not empty")
    tokens = encode(tokenizer, messages)
    if cache is None:
        return tokens
    if not isinstance(cache, PromptCache):
        raise ValueError("with messages, make the prompt cache with glass_mlx.make_prompt_cache")
    cache.check("begin a new one")
    shared = trim_to_shared(cache, tokens)
    if shared is None:
        raise ValueError(
            "the prompt cache has tokens that the messages do not have, and that cannot be "
            "trimmed; make a new one"
        )
    return tokens[shared:]


def _steps(
    session: Session,
    selector: Selector,
    prompt: mx.array,
    max_tokens: int,
    reload: Callable[[], nn.Module] | None,
    drafting: Drafting | None,
    **options: Any,
) -> Generator[Step, None, None]:
    """Generate tokens, and record them in the prompt cache when the generation ends."""
    report_progress = options.pop("prompt_progress_callback", None)
    input_embeddings = options.pop("input_embeddings", None)
    max_kv_size = options.pop("max_kv_size", None)
    draft_model = None if drafting is None else drafting.model
    cache = options.pop("prompt_cache", None)
    cache = cache or make_layers(session.model, max_kv_size, draft_model)
    decoder = _decoder(session, selector, cache, prompt, max_tokens, drafting, **options)
    if isinstance(cache, PromptCache):
        record = cache
    else:  # a cache from mlx-lm cannot hold statistics
        record = PromptCache((), session.empty_statistics([selector.config.statistic]))
    earlier = record.tokens
    # With a reload, dense weights make room for each slice.
    unsliced = frozenset[str]() if reload else session.without_room(selector)
    statistics = record.begin(session.shapes, session.vocabulary_size, session.total)

    def progress(tokens_read: int, total: int) -> None:
        record.follow_prompt(tokens_read, total)
        if report_progress is not None:
            report_progress(tokens_read, total)

    generation = Generation(session, selector, decoder, statistics, reload, earlier, unsliced)
    try:
        yield from generation.steps(progress, input_embeddings)
    except GeneratorExit:  # the caller stopped early
        record.add(decoder.tokens, prompt.size)
        raise
    record.add(decoder.tokens, prompt.size)


def _decoder(
    session: Session,
    selector: Selector,
    cache: list[Any],
    prompt: mx.array,
    max_tokens: int,
    drafting: Drafting | None,
    **options: Any,
) -> Decoder:
    """Return the decode loop on a prompt cache, with drafts of a model, checks of drafts, or none.

    Raises:
        ValueError: if the cache is not one of the model.
    """
    model = session.model
    if drafting is None:
        check_layers(model, cache)
    if drafting is None and not selector.config.has_drafts:
        return Decoder(model, cache, prompt, max_tokens, **options)
    names = [field.name for field in fields(CacheQuantization) if field.name in options]
    options["quantization"] = CacheQuantization(**{name: options.pop(name) for name in names})
    if drafting is None:
        is_pipeline = session.division is not None and session.division.is_pipeline
        ranks = session.ranks if is_pipeline else None
        return CheckedDecoder(model, cache, prompt, max_tokens, ranks=ranks, **options)
    return SpeculativeDecoder(model, cache, prompt, max_tokens, drafting, **options)


def _responses(
    steps: Generator[Step, None, None],
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    detokenizer: StreamingDetokenizer,
    prompt_tokens: int,
    max_tokens: int,
) -> Generator[GenerationResponse, None, None]:
    """Turn tokens into responses, up to an end-of-sequence token."""
    with (
        wired_limit(model, [generation_stream]),  # type: ignore[list-item]
        closing(steps),
    ):
        start = time.perf_counter()
        for n, step in enumerate(steps, 1):
            if n == 1:
                if mx.isnan(step.logprobs).any().item():
                    raise ValueError(_NOT_FINITE)
                prompt_tps = prompt_tokens / (time.perf_counter() - start)
                start = time.perf_counter()
            finish_reason = "length" if n == max_tokens else None
            if step.token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            else:
                detokenizer.add_token(step.token)
            if finish_reason:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tps,
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
                glass=step.report,
            )
            if finish_reason:
                return


def generate(
    model: nn.Module | Session,
    tokenizer: Tokenizer,
    prompt: str | list[int] | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a complete response, as `mlx_lm.generate` does.

    Args:
        model: a model from `load` or from `mlx_lm.load`, or a `Session` of one.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        verbose: print the text as it is generated, and statistics at the end.
        **kwargs: see `stream_generate`. This function raises the same errors.

    Returns:
        The generated text.
    """
    text, response = collect(stream_generate(model, tokenizer, prompt, **kwargs), verbose)
    if verbose:
        print(summary(response))
    return text


def collect(
    responses: Iterable[GenerationResponse], verbose: bool = False
) -> tuple[str, GenerationResponse]:
    """Put the text of responses together.

    Args:
        responses: the responses.
        verbose: whether to print the text as it is generated, between two lines.

    Returns:
        The text, and the last response.
    """
    text = ""
    if verbose:
        print("=" * 10)
    for response in responses:
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
        print("=" * 10)
    return text, response
