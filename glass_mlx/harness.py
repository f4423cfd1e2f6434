"""lm-evaluation-harness with a sliced model; needs `glass-mlx[evaluate]`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from glass_mlx.calibration.first_use import make_selector
from glass_mlx.calibration.texts import null_token
from glass_mlx.chat_templates import encode_text
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, Scores, score
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prompt_cache import PromptCache, make_prompt_cache, read_prompt
from glass_mlx.selection import Selector
from glass_mlx.server.stop_words import StopWords
from glass_mlx.session import Session
from glass_mlx.streaming import stream_generate

import mlx_lm
import numpy as np
from lm_eval.api.model import LM
from mlx_lm.evaluate import DEFAULT_MAX_TOKENS, MLXLM, _lstrip
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm


class GlassLM(MLXLM):
    """mlx-lm's class for the harness, with a sliced model.

    Where the engine writes the dense model's own text, scores are the dense model's. Otherwise
    contexts are read by the dense model, which also computes the first token of a continuation, as
    it does in the engine. The other tokens are scored by the slices that are selected from the
    context; running texts as if the model had written them. What is generated comes from the engine
    itself.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        selector: chooses what is kept; None for the dense model alone.
        prior: the model's prior, or None.
        max_tokens: the maximum number of tokens to generate, over the task's own.
        use_chat_template: whether contexts go through the chat template. Default: if there is one.
        sampler: see `sampling.make_sampler`.

    Attributes:
        is_dense: whether the next answers are the dense model's.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        selector: Selector | None,
        prior: GlobalPrior | None = None,
        max_tokens: int | None = None,
        use_chat_template: bool | None = None,
        sampler: Any = None,
    ) -> None:
        LM.__init__(self)
        self._session, self._model, self.tokenizer = session, session.model, tokenizer
        self._selector, self._prior, self._sampler = selector, prior, sampler
        self._static = self._running = None
        if selector is not None and not selector.is_exact:
            # Drafts change nothing of what is scored. In `_score` the last token of the context
            # counts as the first one of the text.
            config = replace(selector.config, vocabulary=selector.config.vocabulary or 1.0)
            self._running = make_selector(session, tokenizer, prior, config)
            config = replace(config, warmup=2, refresh=0, dense_every=0)
            self._static = make_selector(session, tokenizer, prior, config)
        self._max_tokens, self.is_dense = max_tokens, selector is None
        if use_chat_template is None:
            use_chat_template = tokenizer.chat_template is not None
        self.use_chat_template = use_chat_template
        # What the dense model gives comes with what the slices give.
        self._dense_scores: dict[Any, tuple[float, bool]] = {}
        self._latest_context: PromptCache | None = None

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        pairs = [request.args for request in requests]
        return [self._score(a, b, False) for a, b in tqdm(pairs, desc="loglikelihood")]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text."""
        texts = [request.args[0] for request in requests]
        return [self._score("", text, True)[0] for text in tqdm(texts, desc="rolling")]

    def _score(self, context: str, continuation: str, is_running: bool) -> tuple[float, bool]:
        """Score a continuation.

        Args:
            context: what comes before.
            continuation: the text to score.
            is_running: whether the slices are renewed within the text, as in a generation.
        """
        key = (context, continuation, is_running)
        if self.is_dense and key in self._dense_scores:
            return self._dense_scores[key]
        before, after = self._split(context, continuation, is_running)
        if not after:
            return 0.0, True
        # What follows the last token of the context is scored, too, so that token is in the text.
        text = Continuation(before[:-1], [before[-1], *after])
        selector = self._running if is_running else self._static
        points = (1,) if selector is None else (selector.config.warmup,)
        reading = DenseReading(self._session, text, points, self._read(text.prompt))
        dense = _total(Scores.exact(reading))
        self._dense_scores[key] = dense
        if self.is_dense or selector is None:
            return dense
        return _total(score(reading, selector))

    def _read(self, context: list[int]) -> PromptCache:
        """Return a prompt cache with a context. The choices of a question come one by one."""
        cache = self._latest_context
        if cache is None or cache.tokens != context:
            cache = make_prompt_cache(self._session)
            read_prompt(self._session, context, cache)
            self._latest_context = cache
        return cache

    def _split(
        self, context: str, continuation: str, is_running: bool
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a context, at least two of them, and of its continuation."""
        special = not self.use_chat_template and not is_running
        before = encode_text(self.tokenizer, context, special) if context else []
        whole = encode_text(self.tokenizer, context + continuation, special)
        after = whole[len(before) :]
        limit = self._max_tokens or DEFAULT_MAX_TOKENS
        before = before[max(0, len(before) + len(after) - limit) :]
        start = null_token(self.tokenizer)
        return [start] * max(0, 2 - len(before)) + before, after

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate a text for each context, up to one of the texts that end it."""
        return [self._generate(*request.args) for request in tqdm(requests, desc="generate")]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        tokens = encode_text(self.tokenizer, context, not self.use_chat_template)
        until = options.get("until") or []
        stop_words = StopWords([until] if isinstance(until, str) else [w for w in until if w])
        arguments: dict[str, Any] = {
            "max_tokens": self._max_tokens or options.get("max_gen_toks", DEFAULT_MAX_TOKENS),
            "sampler": self._sampler,
        }
        text = ""
        for response in self._stream(self.tokenizer, tokens, arguments):
            shown, is_stopped = stop_words.feed(response.text)
            text += shown
            if is_stopped:
                break
        text += stop_words.rest()
        return _lstrip(text, self.tokenizer.think_end) if self.tokenizer.has_thinking else text

    def _stream(
        self, tokenizer: TokenizerWrapper, tokens: list[int], arguments: dict[str, Any]
    ) -> Any:
        if self.is_dense or self._selector is None:
            return mlx_lm.stream_generate(self._model, tokenizer, tokens, **arguments)
        config = self._selector.config
        return stream_generate(
            self._session, tokenizer, tokens, config=config, prior=self._prior or False, **arguments
        )


def _total(scores: Scores) -> tuple[float, bool]:
    """Return the log-likelihood of all scored tokens, and whether all are the most likely ones."""
    return -float(scores.nll.sum()), bool(scores.right.all())


def flips(dense: dict[str, Any], sliced: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare two evaluations question by question.

    Args:
        dense: what `lm_eval.simple_evaluate` returned for the dense model.
        sliced: what it returned for the sliced model.

    Returns:
        For each task and each metric that is 0 or 1 for every question, how many questions have
        another outcome.
    """
    found: dict[str, dict[str, Any]] = {}
    for task, samples in sliced["samples"].items():
        for metric in samples[0]["metrics"]:
            before, after = (
                np.array([_value(sample[metric]) for sample in run["samples"][task]])
                for run in (dense, sliced)
            )
            if not {*before, *after} <= {0.0, 1.0}:
                continue
            found.setdefault(task, {})[metric] = {
                "questions": len(after),
                "flips": float((before != after).mean()),
                "lost": int((before > after).sum()),
                "gained": int((before < after).sum()),
            }
    return found


def _value(value: Any) -> float:
    """Return a question's score, or NaN if it is no number."""
    return float(value) if isinstance(value, int | float | np.number) else float("nan")
