"""The life of one generation: dense prefill, selection, slicing, decoding."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glass_mlx.hub import locate
from glass_mlx.models import (
    DOWN_POLICIES,
    FFN,
    find_ffns,
    fingerprint,
    weight_bytes,
    with_modules,
    with_taps,
)
from glass_mlx.prior import (
    BUILD_COMMAND,
    FILE_NAME,
    GlobalPrior,
    cached_priors,
    packaged_priors,
    stored_in,
)
from glass_mlx.ranking import fuse, ranks
from glass_mlx.selection import Selection, budget, select
from glass_mlx.statistics import NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import GenerationResponse as DenseResponse
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

DEFAULT_DENSITY = 0.5
DEFAULT_MIX = 0.5
# Better than the prompt's own statistic on every model and text measured (docs/experiments.md).
DEFAULT_PRIOR_STATISTIC = "griffin"

Tokenizer = TokenizerWrapper | PreTrainedTokenizerBase


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """Take the most likely token, (batch, vocabulary) to (batch,)."""
    return mx.argmax(logprobs, axis=-1)


@dataclass(frozen=True)
class Report:
    """How the FFNs of one generation were sliced.

    For the first token, which the dense model computes, nothing is sliced yet.

    Attributes:
        density: share of neurons asked for.
        density_got: share of neurons that computed this token.
        mix: λ, the weight of the prior; 1 for a prompt of one token, 0 without a prior.
        statistic: the statistic that the prompt ranks neurons by.
        prior_statistic: the statistic that the prior ranks them by.
        prior: the file the prior came from, "given" for one made in this process, or "none".
        down_policy: how quantized down projections are sliced.
        select_time: seconds to rank, fuse and select.
        slice_time: seconds to slice the weights.
        dense_bytes: bytes of weights that the dense model reads for one token.
        sliced_bytes: bytes of weights that were read for this token.
        selection: the kept neurons of each FFN, or None if all were used.
    """

    density: float
    density_got: float
    mix: float
    statistic: str
    prior_statistic: str
    prior: str
    down_policy: str
    select_time: float
    slice_time: float
    dense_bytes: int
    sliced_bytes: int
    selection: Selection | None


@dataclass
class GenerationResponse(DenseResponse):
    """mlx-lm's response, with a report of the slicing added in `glass`."""

    glass: Report | None = None


def model_folder(tokenizer: TokenizerWrapper) -> Path | None:
    """The folder that a model's tokenizer, and so the model, was loaded from, if it was."""
    path = Path(getattr(tokenizer, "name_or_path", None) or "/dev/null")
    return path if path.is_dir() else None


class NoPriorError(ValueError):
    """There is no prior for a model in any of the places where priors are looked for."""


def resolve_prior(
    model: nn.Module,
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it fits.

    Args:
        model: the model.
        prior: a prior, the file of one, or `hub:user/repo`, which is fetched. Default: looked for
            in the model's folder, the user's cache and this package, in that order.
        folder: where the model's files are, if that is known.
        name: how the user calls the model, for the command that builds a prior.
        report: called with a line on each place that was looked in.

    Raises:
        FileNotFoundError: if the given file does not exist.
        NoPriorError: if none is found.
        ValueError: if the prior that was given, or is in the model's folder, is damaged or belongs
            to another model, or if it cannot be fetched.
    """
    widths = {ffn.path: ffn.width for ffn in find_ffns(model)}
    weights = fingerprint(model)
    if prior is None and folder:
        if (folder / FILE_NAME).is_file():
            prior = folder / FILE_NAME
        else:
            report(f"no {FILE_NAME} in the model's folder {folder}")
    if prior is not None:
        prior = prior if isinstance(prior, GlobalPrior) else GlobalPrior.load(locate(prior))
        if reason := prior.mismatch(widths, weights):
            raise ValueError(f"the prior {prior.source} is not for this model: {reason}")
        report(f"using {prior.source or 'the given one'}")
        return prior
    for place in (cached_priors(), packaged_priors()):
        for file in stored_in(place):
            try:
                found = GlobalPrior.load(file) if GlobalPrior.resembles(file, weights) else None
            except ValueError as error:  # one bad file must not stand in the way of all models
                report(f"passing over a file: {error}")
                continue
            if found is not None and found.mismatch(widths, weights) is None:
                report(f"using {found.source}")
                return found
        report(f"none for this model in {place}")
    command = BUILD_COMMAND.format(model=name)
    raise NoPriorError(
        "there is no prior for this model; have a small one built now with --build-prior, build "
        f"one with `{command}` (without a clone: `python -m glass_mlx.calibration` with the same "
        "arguments) and give it with --prior, or select by the prompt alone with --no-prior"
    )


def slice_model(model: nn.Module, selection: Selection, down_policy: str) -> nn.Module:
    """Return a model that computes only the selected neurons; the given one is not touched.

    Args:
        model: the dense model.
        selection: the neurons to keep, by FFN.
        down_policy: a key of `models.DOWN_POLICIES`, for quantized down projections.
    """
    sliced = {
        ffn.path: ffn.sliced(selection.indices[ffn.path], down_policy) for ffn in find_ffns(model)
    }
    return with_modules(model, sliced)


def check_settings(
    density: float, mix: float, statistic: str, down_policy: str, max_tokens: int
) -> None:
    """Check what `stream_generate` is asked for before anything is loaded.

    Raises:
        ValueError: for the first value that is out of range.
    """
    budget(1, density)
    fuse(np.ones(1), np.ones(1), mix)
    NeuronStatistics({}, (statistic,))
    if down_policy not in DOWN_POLICIES:
        raise ValueError(f"down policy {down_policy!r} is not one of {', '.join(DOWN_POLICIES)}")
    if max_tokens == 0:
        raise ValueError("the number of tokens to generate must not be zero; -1 means no limit")


@dataclass(frozen=True)
class _Settings:
    """What the caller asked for, checked."""

    density: float
    mix: float
    statistic: str
    prior_statistic: str
    prior: GlobalPrior | None
    down_policy: str


def _select(
    ffns: list[FFN], statistics: NeuronStatistics, mix: float, settings: _Settings
) -> Selection:
    fused = {}
    for path, scores in statistics.scores(settings.statistic).items():
        fused[path] = ranks(scores)
        if settings.prior is not None:
            general = ranks(settings.prior.scores[settings.prior_statistic][path])
            fused[path] = fuse(fused[path], general, mix)
    return select(fused, settings.density, {ffn.path: ffn.multiple for ffn in ffns})


def _steps(
    model: nn.Module,
    prompt: mx.array,
    max_tokens: int,
    settings: _Settings,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    **kwargs: Any,
) -> Generator[tuple[int, mx.array, Report], None, None]:
    """Yield tokens with their log-probabilities: the first one dense, then sliced."""
    sampler = sampler or greedy_sampler
    logits_processors = logits_processors or []
    ffns = find_ffns(model)
    statistics = NeuronStatistics({ffn.path: ffn.width for ffn in ffns}, (settings.statistic,))
    tapped = with_taps(model, statistics.update)
    cache = prompt_cache or make_prompt_cache(model, max_kv_size)
    first, history = [], []

    def sample_first(logprobs: mx.array) -> mx.array:
        first[:] = [sampler(logprobs), logprobs]
        return first[0]

    def keep_history(tokens: mx.array, logits: mx.array) -> mx.array:
        history[:] = [tokens]
        return logits

    def progress(done: int, total: int) -> None:
        mx.eval(statistics.sums)  # prefill does not evaluate the last layer's FFN
        if prompt_progress_callback is not None:
            prompt_progress_callback(done, total)

    # With no tokens to generate, mlx-lm's loop reads the prompt, samples one token and stops.
    for _ in generate_step(
        prompt,
        tapped,
        max_tokens=0,
        sampler=sample_first,
        logits_processors=[keep_history, *logits_processors] if logits_processors else None,
        prompt_cache=cache,
        prompt_progress_callback=progress,
        input_embeddings=input_embeddings,
        **kwargs,
    ):
        pass
    if statistics.tokens == 0:
        raise ValueError("this model does not run the modules that it shows; it cannot be sliced")
    token, logprobs = first[0].item(), first[1].squeeze(0)
    dense_bytes = weight_bytes(model)
    mix = 0.0 if settings.prior is None else 1.0 if statistics.tokens == 1 else settings.mix
    report = Report(
        density=settings.density,
        density_got=1.0,
        mix=mix,
        statistic=settings.statistic,
        prior_statistic=settings.prior_statistic,
        prior=(settings.prior.source or "given") if settings.prior else "none",
        down_policy=settings.down_policy,
        select_time=0.0,
        slice_time=0.0,
        dense_bytes=dense_bytes,
        sliced_bytes=dense_bytes,
        selection=None,
    )
    yield token, logprobs, report
    if max_tokens == 1:
        return

    start = time.perf_counter()
    selection = _select(ffns, statistics, mix, settings)
    selected = time.perf_counter()
    sliced = slice_model(model, selection, settings.down_policy)
    mx.eval(sliced.parameters())
    report = replace(
        report,
        density_got=selection.density,
        select_time=selected - start,
        slice_time=time.perf_counter() - selected,
        sliced_bytes=weight_bytes(sliced),
        selection=selection,
    )
    del tapped

    def with_history(
        processor: Callable[[mx.array, mx.array], mx.array],
    ) -> Callable[[mx.array, mx.array], mx.array]:
        return lambda tokens, logits: processor(mx.concatenate([*history, tokens]), logits)

    for following, logprobs in generate_step(
        mx.array([token]),
        sliced,
        max_tokens=max_tokens - 1 if max_tokens > 0 else -1,
        sampler=sampler,
        logits_processors=[with_history(processor) for processor in logits_processors],
        prompt_cache=cache,
        **kwargs,
    ):
        yield following, logprobs, report


def stream_generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    density: float = DEFAULT_DENSITY,
    mix: float = DEFAULT_MIX,
    statistic: str = "activation",
    prior_statistic: str = DEFAULT_PRIOR_STATISTIC,
    prior: GlobalPrior | str | Path | Literal[False] | None = None,
    down_policy: str = "requantize",
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text with the feed-forward neurons that matter for the prompt.

    The prompt is read, and the first token computed, by the dense model; the others by a model
    whose FFNs are sliced for this prompt. The given model is not touched.

    Args:
        model: a model from `load` or from `mlx_lm.load`.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        max_tokens: how many tokens to generate at most; -1 for no limit.
        draft_model: must be None; speculative decoding is not combined with slicing.
        density: share of the neurons of each FFN to keep, in (0, 1]. The number is rounded to
            what the layer's kernels can use; `glass.density_got` is the share that came out.
        mix: λ in [0, 1], the weight of the prior's ranking against the prompt's.
        statistic: what the prompt ranks the neurons by, a key of `statistics.STATISTICS`.
        prior_statistic: what the prior ranks them by, one that it has.
        prior: a prior, the file of one or `hub:user/repo`; None to look for it (see
            `resolve_prior`); False to select by the prompt alone.
        down_policy: how quantized down projections are sliced: "requantize" or "scatter".
        **kwargs: passed on to `mlx_lm.generate.generate_step`. With a `prompt_cache` that has
            content already, only the tokens read now are seen by the selection.

    Yields:
        mlx-lm's responses, with a `Report` in `glass`.

    Raises:
        FileNotFoundError: if the prior's file does not exist.
        ValueError: for a value out of range, an empty prompt, a model that cannot be sliced, or a
            missing, damaged or foreign prior.
    """
    check_settings(density, mix, statistic, down_policy, max_tokens)
    if draft_model is not None:
        raise ValueError("a draft model cannot be combined with slicing; use mlx_lm for that")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = _encode(tokenizer, prompt)
    if prompt.size == 0 and kwargs.get("input_embeddings") is None:
        raise ValueError("the prompt is empty")
    if prior is False:
        if prompt.size == 1:
            raise ValueError(
                "a prompt of one token does not tell which neurons matter; use a prior"
            )
        found = None
    else:
        found = resolve_prior(model, prior, model_folder(tokenizer))
        if prior_statistic not in found.scores:
            raise ValueError(
                f"the prior {found.source} has no statistic {prior_statistic!r}; it has "
                f"{', '.join(found.scores)}"
            )
    settings = _Settings(density, mix, statistic, prior_statistic, found, down_policy)
    kwargs.pop("num_draft_tokens", None)  # which mlx-lm ignores without a draft model, too
    steps = _steps(model, prompt, max_tokens, settings, **kwargs)
    return _respond(model, tokenizer, prompt.size, max_tokens, steps)


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
    prompt_tokens: int,
    max_tokens: int,
    steps: Generator[tuple[int, mx.array, Report], None, None],
) -> Generator[GenerationResponse, None, None]:
    """Turn tokens into text and count them, up to an end-of-sequence token."""
    detokenizer = tokenizer.detokenizer
    with wired_limit(model, [generation_stream]):
        start = time.perf_counter()
        for n, (token, logprobs, report) in enumerate(steps, 1):
            if n == 1:
                prompt_tps = prompt_tokens / (time.perf_counter() - start)
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
                prompt_tokens=prompt_tokens,
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
        f"GLASS: density {glass.density_got:.3f} (asked {glass.density:g}), λ {glass.mix:g}, "
        f"prior {glass.prior}, select {glass.select_time:.3f} s, slice {glass.slice_time:.3f} s, "
        f"weights {glass.dense_bytes / 1e6:.1f} -> {glass.sliced_bytes / 1e6:.1f} MB per token"
    )
