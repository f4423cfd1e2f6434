"""Answers, generated one after the other in one thread."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Lock
from typing import Any

from glass_mlx.calibration.first_use import is_measured
from glass_mlx.decoding import Sampler
from glass_mlx.errors import is_library_error, one_line
from glass_mlx.generation_report import GenerationResponse
from glass_mlx.models import world
from glass_mlx.prompt_cache import PromptCache, make_prompt_cache, trim_prompt_cache
from glass_mlx.sampling import make_sampler
from glass_mlx.server.errors import ClientGoneError, RequestError, bad_request, internal_error
from glass_mlx.server.job import Job, Piece, token_logprob
from glass_mlx.server.provider import GlassModelProvider
from glass_mlx.server.stop_words import StopWords
from glass_mlx.session import Session
from glass_mlx.streaming import stream_generate

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    ResponseGenerator,
    _make_logits_processors,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

# Seconds between two looks at whether a client that waits is still there.
_PATIENCE = 0.25

# After Python's end of a thread, MLX frees what belongs to the thread. If the interpreter ends
# meanwhile, the process aborts.
_FREEING_TIME = 0.2

# Below this temperature, sampling is greedy: its reciprocal is not a number any more.
_MIN_TEMPERATURE = 1e-4


# With several ranks, rank 0 tells the others so often whether somebody still waits for an answer.
_SHARED_TOKENS = 16

# What rank 0 says instead of a request when the server ends.
_END = "end"


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class _Progress:
    """Reports how much of a prompt was read, and stops if nobody waits.

    Attributes:
        responses: where to put the numbers of tokens.
        is_over: whether nobody waits for the answer any more.
    """

    responses: "Queue[Any]"
    is_over: Callable[[], bool]

    def __call__(self, tokens_read: int, total: int) -> None:
        """Report the number of tokens that were read, and the total number."""
        if self.is_over():
            raise _StoppedError
        self.responses.put((tokens_read, total))


class GlassResponseGenerator(ResponseGenerator):
    """mlx-lm's generator, without batches: slices belong to one text, so requests wait in a queue.

    Args:
        model_provider: loads the model.
        prompt_cache: keeps the prompt caches of earlier answers.
        max_waiting: the maximum number of requests that wait.
    """

    model_provider: GlassModelProvider

    def __init__(
        self,
        model_provider: GlassModelProvider,
        prompt_cache: LRUPromptCache,
        max_waiting: int,
    ) -> None:
        self._max_waiting, self._entrance, self._ranks = max_waiting, Lock(), world()
        super().__init__(model_provider, prompt_cache)  # starts the thread

    def stop_and_join(self) -> None:
        """End the thread after the current token, and the threads of other ranks."""
        self.end_thread()
        if self._ranks.size > 1:
            self._ranks.share(_END)

    def end_thread(self) -> None:
        """End the thread after the current token."""
        super().stop_and_join()
        time.sleep(_FREEING_TIME)

    def _next_request(self, timeout: float | None = None) -> Any:
        """Return the next request on all ranks, or None; see mlx-lm's method."""
        if self._ranks.size == 1:
            return super()._next_request(timeout)
        item = None
        if self._ranks.is_first:
            with suppress(Empty):
                item = self.requests.get(timeout=timeout or _PATIENCE)
        shared = self._ranks.share(None if item is None else item[1:])
        if shared == _END:
            self._stop = True
        if shared is None or self._stop:
            return None
        return (Queue() if item is None else item[0], *shared)

    def _is_batchable(self, args: GenerationArguments) -> bool:
        return False

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[GenerationContext, Iterator[Piece]]:
        """Wait until a request is served, and return its context and the pieces of its answer.

        Raises:
            ClientGoneError: if the client leaves.
            RequestError: if the request cannot be served.
        """
        assert isinstance(request, Job)
        responses: Queue[Any] = Queue()
        item = (responses, request, generation_args)
        with self._entrance:
            if self.requests.qsize() >= self._max_waiting:
                raise RequestError(
                    503, f"{self._max_waiting} requests are waiting already; try again later"
                )
            self.requests.put(item)
        try:
            context = self._next(responses, request)
        except BaseException:
            request.is_abandoned = True
            self._withdraw(item)
            raise
        return context, self._pieces(responses, request, progress_callback)

    def _withdraw(self, item: Any) -> None:
        """Take a request back if it still waits."""
        with self.requests.mutex:
            if item in self.requests.queue:
                self.requests.queue.remove(item)

    def _next(self, responses: "Queue[Any]", job: Job) -> Any:
        """Return the next thing that the thread says about a request."""
        while True:
            if job.is_gone():
                raise ClientGoneError
            try:
                response = responses.get(timeout=_PATIENCE)
            except Empty:
                if not self.generation_available():
                    raise RequestError(503, "the server is about to end") from None
                continue
            if isinstance(response, Exception):  # from mlx-lm: the model cannot be loaded
                raise RequestError(404, str(response), "model", "model_not_found")
            if isinstance(response, RequestError):
                raise response
            return response

    def _pieces(
        self,
        responses: "Queue[Any]",
        job: Job,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Piece]:
        while (response := self._next(responses, job)) is not None:
            if isinstance(response, Piece):
                job.receive(response)
                yield response
            elif progress is not None:
                progress(*response)

    def _serve_single(self, request: Any, *_: Any) -> None:
        """Generate the answer to a request; whatever happens is put into its queue."""
        responses, job, args = request
        try:
            self._answer(responses, job, args)
        except _StoppedError:
            pass
        except RequestError as error:
            responses.put(error)
        except BaseException as error:
            if not is_library_error(error):
                raise
            logging.exception("a request failed")
            if self._ranks.size > 1:
                os._exit(1)  # the others would wait for this rank in the middle of the answer
            responses.put(internal_error())

    def _answer(self, responses: "Queue[Any]", job: Job, args: GenerationArguments) -> None:
        # 1) Encode the prompt.
        provider = self.model_provider
        tokenizer, session = provider.tokenizer, provider.session
        assert session is not None
        prompt, initial_state = self._encode(job, args)
        _check_tokens(session, prompt, args)

        # 2) Find the longest cached beginning of the prompt. Texts of the dense model have their
        #    own caches, because keys and values of sliced answers differ.
        key = (provider.model_key, job.is_dense or job.config.is_exact)
        cache, unread = self._cached(session, key, prompt)
        context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=self._make_state_machine(provider.model_key, tokenizer, [])[1],
            initial_state=initial_state,
            prompt=prompt,
            prompt_cache_count=len(prompt) - len(unread),
        )

        # 3) Generate, until the text or the client's patience ends.
        def is_over() -> bool:
            is_over_here = self._stop or job.is_abandoned or context._should_stop
            return self._ranks.share(is_over_here)

        every = 1 if self._ranks.size == 1 else _SHARED_TOKENS
        stream = self._stream(session, unread, cache, job, args, _Progress(responses, is_over))
        responses.put(context)
        with closing(stream):
            for piece in _pieces(stream, args, tokenizer):
                responses.put(piece)
                if piece.number % every == 0 and is_over():
                    break
        responses.put(None)

        # 4) Keep the cache, with the answer in it.
        self.prompt_cache.insert_cache(key, [*cache.tokens], cache)

    def _encode(self, job: Job, args: GenerationArguments) -> tuple[list[int], str]:
        """Return the token ids of a prompt, and the state that mlx-lm parses the answer from.

        Raises:
            RequestError: if it cannot be encoded.
        """
        if isinstance(job.prompt, list):
            return job.prompt, "normal"
        try:
            prompt, _, _, initial_state, *_ = self._tokenize(
                self.model_provider.tokenizer, job, args
            )
        except BaseException as error:  # templates and tokenizers raise errors of any type
            if not is_library_error(error):
                raise
            raise bad_request(f"the prompt cannot be encoded: {one_line(error)}") from error
        return list(prompt), initial_state

    def _cached(
        self, session: Session, key: Any, prompt: list[int]
    ) -> tuple[PromptCache, list[int]]:
        """Return a prompt cache, and the tokens of the prompt that are not in it."""
        cache, unread = self.prompt_cache.fetch_nearest_cache(key, prompt)
        if cache is not None and not unread and trim_prompt_cache(cache, 1):
            unread = prompt[-1:]  # the model must read something to continue from
        if cache is None or not unread:
            draft_model = self.model_provider.draft_model
            cache = make_prompt_cache(session, self.cli_args.max_kv_size, draft_model)
            unread = prompt
        return cache, unread

    def _stream(
        self,
        session: Session,
        unread: list[int],
        cache: PromptCache,
        job: Job,
        args: GenerationArguments,
        progress: Callable[[int, int], None],
    ) -> Any:
        """Return the stream of responses.

        Raises:
            RequestError: if the prompt is not enough to select neurons from, or if it is not known
                what slicing costs.
        """
        if not is_measured(session, self.model_provider.prior, job.config):
            raise bad_request(
                "this server has not measured what slicing costs; give glass.density, or "
                "start it with --max-kl and a bound above 0",
                "glass.max_kl",
            )
        tokenizer, flags = self.model_provider.tokenizer, self.cli_args
        if args.seed is not None:
            mx.random.seed(args.seed)
        try:
            return stream_generate(
                session,
                tokenizer,
                unread,
                args.max_tokens,
                self.model_provider.draft_model,
                num_draft_tokens=args.num_draft_tokens,
                config=job.config,
                prior=self.model_provider.prior or False,
                sampler=_sampler(args, tokenizer),
                logits_processors=_make_logits_processors(args),
                prompt_cache=cache,
                prompt_progress_callback=progress,
                prefill_step_size=flags.prefill_step_size,
                kv_bits=flags.kv_bits,
                kv_group_size=flags.kv_group_size,
                quantized_kv_start=flags.quantized_kv_start,
            )
        except ValueError as error:
            raise bad_request(str(error)) from error


def _sampler(args: GenerationArguments, tokenizer: TokenizerWrapper) -> Sampler:
    """Return the sampler of a request, with the settings of mlx-lm's server."""
    sampling = args.sampling
    return make_sampler(
        sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        xtc_probability=sampling.xtc_probability,
        xtc_threshold=sampling.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def _check_tokens(session: Session, prompt: list[int], args: GenerationArguments) -> None:
    """Check what only the model knows the limits of.

    Raises:
        RequestError: if the prompt is empty, or a token is not one of the model's.
    """
    if not prompt:
        raise bad_request("the prompt is empty")
    try:
        session.check_tokens([*prompt, *(args.logits.logit_bias or ())])
    except ValueError as error:
        raise bad_request(str(error)) from error
    sampling = args.sampling
    if sampling.top_k >= session.vocabulary_size:
        sampling.top_k = 0
    if sampling.temperature < _MIN_TEMPERATURE:
        sampling.temperature = 0


def _pieces(
    stream: Iterator[GenerationResponse], args: GenerationArguments, tokenizer: Any
) -> Iterator[Piece]:
    """Turn responses into pieces, up to a stop word.

    At a stop, mlx-lm's handler throws away the text of the last piece, and the text that it has
    held back. So that nothing is lost, the last text comes in a piece of its own, which looks as if
    the length had ended the answer, and an empty piece follows.
    """
    stop_words, start = StopWords(args.stop_words), None
    for response in stream:
        assert response.glass is not None
        start = start or time.perf_counter()
        text, is_stopped = stop_words.feed(response.text)
        reason = "stop" if is_stopped else response.finish_reason
        text += stop_words.rest() if reason else ""
        logprobs = None
        if args.logprobs or args.top_logprobs > 0:
            logprobs = token_logprob(
                response.token, response.logprobs, args.top_logprobs, tokenizer
            )
        piece = Piece(
            text=text,
            token=response.token,
            logprob=0.0,
            finish_reason="length" if reason else None,
            top_tokens=({},),
            number=response.generation_tokens,
            report=response.glass,
            seconds=time.perf_counter() - start,
            logprobs=logprobs,
        )
        yield piece
        if reason == "stop":
            yield Piece(**(vars(piece) | {"text": "", "finish_reason": "stop", "logprobs": None}))
        if reason:
            return
