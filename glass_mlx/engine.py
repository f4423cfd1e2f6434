"""The life of one generation: dense prefill, selection, slicing, decoding, renewal."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from glass_mlx.curve import check_bound, expected_density
from glass_mlx.lookup import model_folder, resolve_prior
from glass_mlx.models import default_down_policy, find_ffns, weight_bytes, with_taps
from glass_mlx.prior import GlobalPrior
from glass_mlx.prompt_cache import PromptCache
from glass_mlx.rewind import Mark
from glass_mlx.selection import Selection
from glass_mlx.slicing import (
    DEFAULT_DENSITY,
    DEFAULT_MIX,
    DEFAULT_PRIOR_STATISTIC,
    DEFAULT_REFRESH,
    DEFAULT_STATISTIC,
    DEFAULT_WARMUP,
    ENOUGH,
    FEW,
    Evidence,
    Slicer,
    Slicing,
)

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse as DenseResponse
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

AUTO = "auto"

Tokenizer = TokenizerWrapper | PreTrainedTokenizerBase


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """Take the most likely token, (batch, vocabulary) to (batch,)."""
    return mx.argmax(logprobs, axis=-1)


@dataclass(frozen=True)
class Report:
    """How the FFNs of one generation were sliced, up to the token that it comes with.

    Attributes:
        dense: whether this token was computed by the dense model.
        density: share of neurons asked for.
        density_got: share of neurons in the slices; 1 before there are any.
        mix: λ, the weight of the prior; 1 if only one token was read, 0 without a prior.
        statistic: the statistic that the tokens read rank neurons by.
        prior_statistic: the statistic that the prior ranks them by.
        prior: the file the prior came from, "given" for one made in this process, or "none".
        down_policy: how quantized down projections are sliced.
        dense_tokens: generated tokens that the dense model computed.
        reread_tokens: generated tokens that the dense model read again.
        selections: how many times neurons were selected.
        select_time: seconds to rank, fuse and select, all times together.
        slice_time: seconds to slice the weights, all times together.
        reread_time: seconds to read tokens again, all times together.
        dense_bytes: bytes of weights that the dense model reads for one token.
        sliced_bytes: bytes that the sliced model reads; all before there is one.
        held_bytes: bytes of arrays in this process after the latest slicing: the dense weights, if
            they were not released, the slices, and the cache.
        selection: the kept neurons of each FFN, or None before they are selected.
    """

    dense: bool
    density: float
    density_got: float
    mix: float
    statistic: str
    prior_statistic: str
    prior: str
    down_policy: str
    dense_tokens: int
    reread_tokens: int
    selections: int
    select_time: float
    slice_time: float
    reread_time: float
    dense_bytes: int
    sliced_bytes: int
    held_bytes: int
    selection: Selection | None


@dataclass
class GenerationResponse(DenseResponse):
    """mlx-lm's response, with a report of the slicing added in `glass`."""

    glass: Report | None = None


# A token, its log-probabilities, and how it was computed.
_Step = tuple[int, mx.array, Report]


class _Generation:
    """One generation: dense at first, then sliced, and renewed by densely reading what was written.

    Args:
        model: the dense model.
        slicing: how it is sliced.
        cache: the prompt cache, a layer an entry; what is known of a `PromptCache` is used, and
            kept up to date.
        sampler: log-probabilities (1, vocabulary) to a token (1,).
        processors: called with all tokens so far and logits (1, vocabulary).
        reload: see `stream_generate`.
        options: for `mlx_lm.generate.generate_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        slicing: Slicing,
        cache: list[Any],
        sampler: Callable[[mx.array], mx.array],
        processors: Sequence[Callable[[mx.array, mx.array], mx.array]],
        reload: Callable[[], nn.Module] | None,
        options: dict[str, Any],
    ) -> None:
        self._model, self._slicing, self._cache = model, slicing, cache
        self._sampler, self._processors, self._options = sampler, processors, options
        self._ffns = find_ffns(model)
        self._kept = (
            cache
            if isinstance(cache, PromptCache)
            else PromptCache((), Evidence.of(model, [slicing.statistic]))
        )
        if self._kept.evidence is None:
            self._kept.evidence = Evidence.of(model)
        self._evidence = self._kept.evidence
        if not self._kept.intact:
            raise ValueError("the prompt cache was left in the middle of a step; begin a new one")
        if self._evidence.prompt.widths != {ffn.path: ffn.width for ffn in self._ffns}:
            raise ValueError("the statistics of the prompt cache are of another model")
        self._slicer = Slicer(model, slicing.down_policy, reload)
        self._tokens: list[int] = []  # of the prompt, and all that were sampled
        self._made = 0
        dense_bytes = weight_bytes(model)
        self._report = Report(
            dense=True,
            density=slicing.density,
            density_got=1.0,
            mix=0.0,
            statistic=slicing.statistic,
            prior_statistic=slicing.prior_statistic,
            prior=(slicing.prior.source or "given") if slicing.prior else "none",
            down_policy=slicing.down_policy,
            dense_tokens=0,
            reread_tokens=0,
            selections=0,
            select_time=0.0,
            slice_time=0.0,
            reread_time=0.0,
            dense_bytes=dense_bytes,
            sliced_bytes=dense_bytes,
            held_bytes=mx.get_active_memory(),
            selection=None,
        )

    def steps(
        self, prompt: mx.array, max_tokens: int, **options: Any
    ) -> Generator[_Step, None, None]:
        """Yield tokens, with more options for reading the prompt."""
        self._tokens = prompt.tolist()
        self._kept.intact = False
        try:
            yield from self._steps(prompt, max_tokens, **options)
        except GeneratorExit:
            self._kept.add(self._tokens)
            raise
        self._kept.add(self._tokens)

    def _steps(
        self, prompt: mx.array, max_tokens: int, **options: Any
    ) -> Generator[_Step, None, None]:
        limit = math.inf if max_tokens < 0 else max_tokens
        ends = chain(self._slicing.renewals(), [math.inf])
        tapped = with_taps(self._model, self._evidence.prompt.update, few=FEW)
        yield from self._decode(tapped, prompt, 1, limit, dense=True, **options)
        text = self._evidence.text
        tapped = with_taps(self._model, text.update, text.update_outputs)
        if self._made < min(warmup := next(ends), limit):
            yield from self._decode(tapped, self._last(1), warmup, limit, dense=True)
        while self._made < limit:
            end, start = next(ends), self._made
            mark = Mark(self._cache if end < limit else [])
            sliced = self._sliced()
            yield from self._decode(sliced, self._last(1), end, limit)
            del sliced  # its slices can go as soon as there are new ones
            if end < limit:
                fed = self._made - start
                mark.rewind(fed)
                yield from self._reread(tapped, fed, limit)

    def _reread(self, tapped: nn.Module, fed: int, limit: float) -> Generator[_Step, None, None]:
        """Read densely what was fed to the slices, and the token after it."""
        start = time.perf_counter()
        steps = self._decode(tapped, self._last(fed + 1), self._made + 1, limit, dense=True)
        token, logprobs, _ = next(steps)
        self._report = replace(
            self._report,
            reread_tokens=self._report.reread_tokens + fed,
            reread_time=self._report.reread_time + time.perf_counter() - start,
        )
        with closing(steps):
            yield token, logprobs, self._report
            yield from steps

    def _last(self, count: int) -> mx.array:
        return mx.array(self._tokens[-count:], mx.uint32)

    def _decode(
        self,
        model: nn.Module,
        given: mx.array,
        until: float,
        limit: float,
        *,
        dense: bool = False,
        prompt_progress_callback: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Generator[_Step, None, None]:
        """Read tokens and go on to `until` tokens in all, the last of them not read by the model.

        But if `limit` comes first, or the caller has enough, the cache is left as mlx-lm leaves it.
        """
        final = until >= limit
        more = -1 if limit == math.inf and final else int(min(until, limit)) - self._made
        earlier = mx.array(self._tokens[: len(self._tokens) - given.size], mx.uint32)
        ahead: list[mx.array] = []

        def sampler(logprobs: mx.array) -> mx.array:
            ahead[:] = [self._sampler(logprobs), logprobs]
            return ahead[0]

        def with_earlier(
            processor: Callable[[mx.array, mx.array], mx.array],
        ) -> Callable[[mx.array, mx.array], mx.array]:
            return lambda tokens, logits: processor(mx.concatenate([earlier, tokens]), logits)

        def progress(done: int, total: int) -> None:
            if dense:  # prefill does not evaluate the last layer's FFN
                text = self._evidence.text
                mx.eval(self._evidence.prompt.sums, text.sums, text.outputs)
            if prompt_progress_callback is not None:
                prompt_progress_callback(done, total)

        def computed() -> Iterator[tuple[int, mx.array]]:
            yield from generate_step(
                given,
                model,
                # mlx-lm's loop samples one token more than it yields
                max_tokens=more if final else more - 1,
                sampler=sampler,
                logits_processors=[with_earlier(processor) for processor in self._processors],
                prompt_cache=self._cache,
                prompt_progress_callback=progress,
                **self._options,
                **options,
            )
            if not final:
                yield ahead[0].item(), ahead[1].squeeze(0)

        for token, logprobs in computed():
            if self._evidence.prompt.tokens == 0:
                raise ValueError(
                    "this model does not run the modules that it shows; it cannot be sliced"
                )
            self._made += 1
            self._tokens.append(token)
            self._report = replace(
                self._report, dense=dense, dense_tokens=self._report.dense_tokens + dense
            )
            try:
                yield token, logprobs, self._report
            except GeneratorExit:
                if not final and self._made == until:
                    self._read(token)
                raise

    def _read(self, token: int) -> None:
        """Put a token into the cache, where mlx-lm has it when it hands a token out."""
        self._model(mx.array([[token]], mx.uint32), cache=self._cache)
        mx.eval([layer.state for layer in self._cache])

    def _sliced(self) -> nn.Module:
        """Select by all that was read densely, and slice."""
        start = time.perf_counter()
        wanted = self._slicing.select(self._ffns, self._evidence)
        stand_ins = self._evidence.stand_ins()
        selected = time.perf_counter()
        sliced, selection = self._slicer(wanted, stand_ins)
        report = self._report
        self._report = replace(
            report,
            density_got=selection.density,
            mix=self._slicing.weight(self._evidence),
            selections=report.selections + 1,
            select_time=report.select_time + selected - start,
            slice_time=report.slice_time + time.perf_counter() - selected,
            sliced_bytes=weight_bytes(sliced),
            held_bytes=mx.get_active_memory(),
            selection=selection,
        )
        return sliced


def check(
    *, max_tokens: int, density: float | str, max_kl: float | None, **options: Any
) -> Slicing:
    """Check what `stream_generate` is asked for before anything is loaded.

    Returns:
        How to slice, without the prior; for the density "auto" as if all were kept.

    Raises:
        ValueError: for the first value that is out of range.
    """
    slicing = Slicing(density=1.0 if density == AUTO else density, **options)
    slicing.check()
    if (density == AUTO) != (max_kl is not None):
        raise ValueError(
            "the density auto and a bound on KL (--max-kl, max_kl) go together; give both or none"
        )
    if max_kl is not None:
        check_bound(max_kl)
    if max_tokens == 0:
        raise ValueError("the number of tokens to generate must not be zero; -1 means no limit")
    return slicing


def stream_generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    density: float | Literal["auto"] = DEFAULT_DENSITY,
    max_kl: float | None = None,
    mix: float = DEFAULT_MIX,
    warmup: int = DEFAULT_WARMUP,
    refresh: int = DEFAULT_REFRESH,
    statistic: str = DEFAULT_STATISTIC,
    prior_statistic: str = DEFAULT_PRIOR_STATISTIC,
    prior: GlobalPrior | str | Path | Literal[False] | None = None,
    down_policy: str | None = None,
    reload: Callable[[], nn.Module] | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text with the feed-forward neurons that matter for the prompt.

    The prompt is read, and the first tokens are computed, by the dense model; the others by a
    model whose FFNs are sliced for this text. From time to time the dense model reads what was
    written, which repairs the cache, and the slices are made anew. The given model is not touched.

    Args:
        model: a model from `load` or from `mlx_lm.load`.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        max_tokens: how many tokens to generate at most; -1 for no limit.
        draft_model: must be None; speculative decoding is not combined with slicing.
        density: share of the neurons of each FFN to keep, in (0, 1]. The number is rounded to
            what the layer's kernels can use; `glass.density_got` is the share that came out.
            "auto" for the lowest that is expected to hold `max_kl`.
        max_kl: KL divergence from the dense model, in nats a token, for the density "auto".
        mix: λ in [0, 1], the weight of the prior's ranking against that of the tokens read.
        warmup: how many tokens are computed densely before the first selection.
        refresh: every how many tokens the text is read densely again and the selection renewed;
            the interval doubles with every fourth time. 0 for never.
        statistic: what the tokens read rank the neurons by, a key of `statistics.STATISTICS`.
        prior_statistic: what the prior ranks them by, one that it has.
        prior: a prior, the file of one or `hub:user/repo`; None to look for it (see
            `resolve_prior`); False to select by the tokens read alone.
        down_policy: how quantized down projections are sliced, a key of `models.DOWN_POLICIES`.
            Default: `models.default_down_policy`.
        reload: loads the model once more without evaluating its arrays, as in
            `lambda: load(name, lazy=True)[0]`. If it is given, the dense weights of each FFN are
            released as soon as its slice exists, and come back when they are used again, from
            the model's files: less memory, but loading with every `refresh`.
        **kwargs: passed on to `mlx_lm.generate.generate_step`. With a `prompt_cache` of
            `glass_mlx.make_prompt_cache` only what is new is read, and the statistics of what was
            read before count, too; with one of mlx-lm's, those of the tokens that are read now.

    Yields:
        mlx-lm's responses, with a `Report` in `glass`.

    Raises:
        FileNotFoundError: if the prior's file does not exist.
        ValueError: for a value out of range, an empty prompt, a model that cannot be sliced, or a
            missing, damaged or foreign prior.
    """
    slicing = check(
        max_tokens=max_tokens,
        density=density,
        max_kl=max_kl,
        mix=mix,
        warmup=warmup,
        refresh=refresh,
        statistic=statistic,
        prior_statistic=prior_statistic,
        down_policy=down_policy or default_down_policy(),
    )
    if draft_model is not None:
        raise ValueError("a draft model cannot be combined with slicing; use mlx_lm for that")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = _encode(tokenizer, prompt)
    if prompt.size == 0 and kwargs.get("input_embeddings") is None:
        raise ValueError("the prompt is empty")
    known = getattr(kwargs.get("prompt_cache"), "tokens", ())
    if prior is False and len(known) + prompt.size == 1 and warmup <= ENOUGH:
        raise ValueError("a prompt of one token does not tell which neurons matter; use a prior")
    if prior is not False:
        found = resolve_prior(model, prior, model_folder(tokenizer))
        slicing = replace(slicing, prior=found)
        slicing.check()
    if density == AUTO:
        slicing = replace(slicing, density=expected_density(slicing.prior, max_kl))
    kwargs.pop("num_draft_tokens", None)  # which mlx-lm ignores without a draft model, too
    return _respond(model, tokenizer, prompt, max_tokens, slicing, reload, **kwargs)


def _encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | list[int]) -> mx.array:
    """Token ids, (T,), of a prompt; a text that starts with the BOS token gets no second one."""
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        add_special_tokens = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    return mx.array(prompt, mx.uint32)


def _respond(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    max_tokens: int,
    slicing: Slicing,
    reload: Callable[[], nn.Module] | None,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Turn tokens into text and count them, up to an end-of-sequence token."""
    detokenizer = tokenizer.detokenizer
    generation = _Generation(
        model,
        slicing,
        prompt_cache or make_prompt_cache(model, max_kv_size),
        sampler or greedy_sampler,
        logits_processors or [],
        reload,
        kwargs,
    )
    steps = generation.steps(
        prompt,
        max_tokens,
        prompt_progress_callback=prompt_progress_callback,
        input_embeddings=input_embeddings,
    )
    with wired_limit(model, [generation_stream]), closing(steps):
        start = time.perf_counter()
        for n, (token, logprobs, report) in enumerate(steps, 1):
            if n == 1:
                prompt_tps = prompt.size / (time.perf_counter() - start)
                start = time.perf_counter()
            finish_reason = "length" if n == max_tokens else None
            if token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            else:
                detokenizer.add_token(token)
            if finish_reason:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=False,
                prompt_tokens=prompt.size,
                prompt_tps=prompt_tps,
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
                glass=report,
            )
            if finish_reason:
                return


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a complete response, as `mlx_lm.generate` does.

    Args:
        model: a model from `load` or from `mlx_lm.load`.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        verbose: print the text as it comes, and statistics at the end.
        **kwargs: see `stream_generate`, whose errors this function raises.

    Returns:
        The generated text.
    """
    text = ""
    responses = stream_generate(model, tokenizer, prompt, **kwargs)
    if verbose:
        print("=" * 10)
    for response in responses:
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
        print("=" * 10)
        print(_summary(response))
    return text


def _summary(response: GenerationResponse) -> str:
    """The closing statistics: mlx-lm's lines, and one on the slicing."""
    glass = response.glass
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"GLASS: density {glass.density_got:.3f} (asked {glass.density:g}), λ {glass.mix:.2f}, "
        f"prior {glass.prior}, weights {glass.dense_bytes / 1e6:.1f} -> "
        f"{glass.sliced_bytes / 1e6:.1f} MB per token\n"
        f"GLASS: {glass.dense_tokens} tokens dense, {glass.reread_tokens} read again in "
        f"{glass.reread_time:.3f} s, {glass.selections} selections: select "
        f"{glass.select_time:.3f} s, slice {glass.slice_time:.3f} s; "
        f"{glass.held_bytes / 1e9:.3f} GB held"
    )
