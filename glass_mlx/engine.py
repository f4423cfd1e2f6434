"""One generation, phase by phase: dense at first, then on slices that are renewed."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from glass_mlx.checked_decoding import CheckedDecoder, CheckedModel
from glass_mlx.config import DRAFT_WARMUP
from glass_mlx.decoding import Decoder
from glass_mlx.draft_shortlist import MAX_DRAFTS, DraftShortlister
from glass_mlx.generation_report import Report, Reporter
from glass_mlx.models import LogitsOfHidden, ObservedLogits
from glass_mlx.renewal import is_dense_pass, is_dense_token, stretches
from glass_mlx.selection import Selection, Selector
from glass_mlx.session import Session
from glass_mlx.slicing import mean_compensation
from glass_mlx.speculation import SpeculativeDecoder, TargetModel
from glass_mlx.statistics import LocalStatistics
from glass_mlx.token_observer import TokenObserver
from glass_mlx.vocabulary import Shortlist

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

Progress = Callable[[int, int], None]


class Interleaved(nn.Module):
    """A sliced model that leaves some tokens to the dense model.

    mlx-lm's loop calls it once for each token and computes one token ahead, so nothing waits for a
    change of models.

    Args:
        sliced: the sliced model.
        dense: the dense model.
        generated: the number of tokens that were generated before the first call.
        is_dense: whether the dense model computes a token, by its number.
    """

    def __init__(
        self,
        sliced: nn.Module,
        dense: nn.Module,
        generated: int,
        is_dense: Callable[[int], bool],
    ) -> None:
        super().__init__()
        self.sliced, self.dense = sliced, dense
        self._number, self._is_dense = generated, is_dense

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """Compute the logits of the next token; the arguments are the models'."""
        self._number += 1
        model = self.dense if self._is_dense(self._number) else self.sliced
        return model(*args, **kwargs)

    def was_dense(self, number: int) -> bool:
        """Return whether the dense model computed a token, by its number."""
        return self._is_dense(number)


@dataclass(frozen=True)
class Step:
    """A generated token.

    Attributes:
        token: its id.
        logprobs: (vocabulary,) log-probabilities.
        from_draft: whether a draft model proposed it.
        report: the report up to this token.
    """

    token: int
    logprobs: mx.array
    from_draft: bool
    report: Report


class Generation:
    """One generation, which alternates between the dense model and the sliced model.

    Args:
        session: the dense model's session.
        selector: chooses the neurons and tokens.
        decoder: runs models on the prompt cache.
        statistics: the local statistics, including those of earlier turns of the conversation.
        reload: loads the model once more; see `SlicedModel`.
        earlier: the tokens of earlier turns of the conversation.
        unsliced: the FFNs that are not sliced, for want of memory.
    """

    def __init__(
        self,
        session: Session,
        selector: Selector,
        decoder: Decoder,
        statistics: LocalStatistics,
        reload: Callable[[], nn.Module] | None = None,
        earlier: Sequence[int] = (),
        unsliced: frozenset[str] = frozenset(),
    ) -> None:
        self._session, self._selector, self._decoder = session, selector, decoder
        self._statistics = statistics
        self._drafter: DraftShortlister | None = None
        cost = session.head_cost if isinstance(decoder, CheckedDecoder) else None
        if cost is not None:
            self._drafter = selector.draft_shortlister(
                statistics.vocabulary, session.vocabulary_size, cost
            )
            assert session.head is not None
            self._check = LogitsOfHidden(session.model, session.head)
        self._shortlister = self._drafter or selector.shortlister(statistics.vocabulary)
        if self._shortlister is not None:
            self._shortlister.keep(earlier)
        self._observer = TokenObserver(statistics.text, self._shortlister)
        self._slices = session.sliced_model(selector.config.down_policy, reload, unsliced)
        self._bytes_with_whole_head = session.weight_bytes
        self._reporter = Reporter(
            selector, session.weight_bytes, self._slices.down_policy, unsliced
        )

    def steps(
        self, progress: Progress | None = None, input_embeddings: mx.array | None = None
    ) -> Generator[Step, None, None]:
        """Generate tokens.

        Args:
            progress: called with the number of prompt tokens read so far, and the total number.
            input_embeddings: (T, hidden size), used as in `mlx_lm.generate.generate_step`.
        """
        try:
            yield from self._phases(progress, input_embeddings)
        finally:
            self._flush()

    def _phases(
        self, progress: Progress | None, input_embeddings: mx.array | None
    ) -> Generator[Step, None, None]:
        decoder, statistics = self._decoder, self._statistics
        config = self._selector.config

        # 1) Prefill. The dense model reads the prompt while its FFNs are observed, unless all of
        #    their neurons are kept.
        is_exact = self._selector.is_exact
        reader = self._session.model if is_exact else self._session.observed_on_prompt(statistics)
        prompt = decoder.last(len(decoder.tokens))
        yield from self._dense_steps(
            reader, prompt, until=1, progress=progress, input_embeddings=input_embeddings
        )

        # 2) Warm-up. The dense model writes the first tokens, which are observed separately. Soon
        #    its tokens are drafted, too; see 5).
        observed = self._session.observed_by_token(self._observer, with_ffns=not is_exact)
        writer: nn.Module = observed
        if isinstance(decoder, SpeculativeDecoder):
            writer = TargetModel(observed, self._observer)
        undrafted = min(config.warmup, DRAFT_WARMUP) if self._drafter else config.warmup
        if decoder.generated < min(undrafted, decoder.limit):
            yield from self._dense_steps(writer, decoder.last(1), until=undrafted)
        if self._drafter:
            warmup = min(config.warmup, decoder.limit)
            yield from self._drafted_steps(self._drafter, observed, until=warmup)

        if is_exact and not self._drafter:
            if decoder.generated < decoder.limit:
                yield from self._dense_steps(writer, decoder.last(1), until=decoder.limit)
            return
        for _, stop in stretches(config, decoder.limit):
            # 3) Select neurons from everything that the dense model has read.
            # 4) Slice their rows and columns into smaller matrices.
            self._slice_neurons()

            # 5) Decode on the slices until the next renewal. Now and then the dense model computes
            #    a token, which adds to the statistics.
            if self._drafter:
                yield from self._drafted_steps(self._drafter, observed, until=stop)
            else:
                self._slice_head()
                yield from self._sliced_steps(writer, until=stop)

    def _slice_neurons(self) -> None:
        """Choose neurons, and bring their slices up to date."""
        if self._selector.is_exact:
            return
        self._flush()
        with self._reporter.timed("select_time"):
            selection = self._selector.select(self._statistics)
            compensation = mean_compensation(self._statistics)
        with self._reporter.timed("slice_time"):
            self._slices.update(selection, compensation)
        self._bytes_with_whole_head = self._session.bytes_of(self._slices.with_whole_head)

    def _slice_head(self) -> Shortlist | None:
        """Choose the tokens whose logits are computed, and slice their rows of the head.

        Returns:
            The tokens, or None for all.
        """
        self._flush()
        shortlist = None
        if self._drafter:
            assert isinstance(self._decoder, CheckedDecoder)
            self._drafter.reads_again = not self._decoder.can_take_back(MAX_DRAFTS)
        if self._shortlister:
            with self._reporter.timed("select_time"):
                shortlist = self._shortlister.choose(self._decoder.tokens)
        self._check_agreement(shortlist)
        with self._reporter.timed("slice_time"):
            self._slices.slice_head(shortlist)
        are_neurons_sliced = bool(self._slices.slices)
        if shortlist or are_neurons_sliced or self._reporter.report.selections:
            selection = (
                self._slices.selection
                if are_neurons_sliced
                else Selection.everything(self._session.shapes)
            )
            self._reporter.slices(
                selection,
                shortlist,
                self._selector.prior_weight(self._statistics),
                self._bytes_with_whole_head - self._slices.unread_head_bytes,
            )
        return shortlist

    def _drafted_steps(
        self, shortlister: DraftShortlister, dense: ObservedLogits, until: float
    ) -> Generator[Step, None, None]:
        """Generate with drafts from shortlists, up to a total number of generated tokens.

        Where drafts do not pay, the models compute tokens one by one.

        Args:
            shortlister: chooses the shortlists.
            dense: the observed dense model.
            until: the number of tokens.
        """
        decoder, slices = self._decoder, self._slices
        while decoder.generated < until:  # once more whenever drafts were wrong
            shortlist = self._slice_head()
            if shortlist is None:
                yield from self._sliced_steps(dense, until)
                continue
            hidden: list[mx.array] = []
            model = CheckedModel(
                slices.drafting_model(slices.with_whole_head, hidden.append),
                slices.drafting_model(dense.model, hidden.append),  # checks observe the logits
                self._is_dense,
                hidden,
                self._check,
                self._observer,
                shortlister,
            )
            yield from self._checked_steps(model, until)
            del model, hidden  # so that the head's slice can be freed before a new one is made

    def _checked_steps(self, model: CheckedModel, until: float) -> Generator[Step, None, None]:
        """Generate with drafts and checks, up to a total number of generated tokens."""
        assert self._session.head is not None
        head, report = self._session.head.bytes, self._reporter.report
        dense_bytes = report.dense_bytes - self._slices.unread_head_bytes
        sliced_bytes = report.sliced_bytes
        passes = dense_passes = checks = 0

        def count_reads() -> None:
            """Record what was read since the last call."""
            nonlocal passes, dense_passes, checks
            drafts, dense = model.passes - passes, model.dense_passes - dense_passes
            read = dense * dense_bytes + (drafts - dense) * sliced_bytes
            self._reporter.drafts(drafts, read + (model.checks - checks) * head)
            passes, dense_passes, checks = model.passes, model.dense_passes, model.checks

        with closing(self._decoder.run(model, self._decoder.last(1), until)) as run:
            for sampled in run:
                count_reads()
                is_dense = self._is_dense(self._decoder.generated)
                yield Step(*sampled, self._reporter.token(is_dense, is_checked=True))
        count_reads()  # after the last block, tokens may be read again

    def _is_dense(self, number: int) -> bool:
        """Return whether the dense model computes a token, by its number, to observe it."""
        config = self._selector.config
        return not config.is_exact and (number <= config.warmup or is_dense_token(config, number))

    def _flush(self) -> None:
        """Add what is observed to the statistics."""
        with mx.stream(generation_stream):  # in the order of the decode loop; see `Ranks.settle`
            self._observer.flush()
        self._session.ranks.settle()

    def _check_agreement(self, shortlist: Shortlist | None) -> None:
        """Check that all ranks of a divided model go on with the same tokens."""
        chosen = None if shortlist is None else (shortlist.rows.tobytes(), shortlist.outside)
        self._session.ranks.check_agreement(self._decoder.tokens, chosen)

    def _dense_steps(
        self,
        model: nn.Module,
        unread: mx.array,
        until: float,
        progress: Progress | None = None,
        **options: Any,
    ) -> Generator[Step, None, None]:
        """Generate with the observed dense model, up to a total number of generated tokens."""

        def evaluate(tokens_read: int, total: int) -> None:
            mx.eval(self._statistics.arrays)  # prefill does not evaluate the last FFN's
            if progress is not None:
                progress(tokens_read, total)

        run = self._decoder.run(model, unread, until, prompt_progress_callback=evaluate, **options)
        with closing(run):
            for sampled in run:
                if self._statistics.prompt.tokens == 0 and not self._selector.is_exact:
                    raise ValueError(
                        "this model does not run the modules that it exposes; it cannot be sliced"
                    )
                yield Step(*sampled, self._reporter.token(dense=True))

    def _sliced_steps(self, dense: nn.Module, until: float) -> Generator[Step, None, None]:
        """Generate with the sliced model, up to a total number of generated tokens.

        Where the text is the dense model's own, that one computes and observes every token.

        Args:
            dense: the observed dense model.
            until: the number of tokens.
        """
        decoder, sliced = self._decoder, self._slices.model
        if self._selector.is_exact:
            yield from self._dense_steps(dense, decoder.last(1), until)
            return
        model: Interleaved | TargetModel
        if isinstance(dense, TargetModel):
            model = TargetModel(dense.dense, self._observer, sliced, self._is_dense_pass_due)
        else:
            model = Interleaved(sliced, dense, decoder.generated, self._is_dense)
        run = decoder.run(model, decoder.last(1), until)
        with closing(run):
            for sampled in run:
                is_dense = model.was_dense(decoder.generated)
                yield Step(*sampled, self._reporter.token(is_dense))

    def _is_dense_pass_due(self) -> bool:
        """Return whether the dense model computes the next pass of speculative decoding."""
        config = self._selector.config
        dense = self._reporter.report.dense_tokens - config.warmup
        return is_dense_pass(config, self._decoder.generated, dense)
