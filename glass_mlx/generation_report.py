"""The report of a generation: the state of the slices, token counts, times and bytes."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from glass_mlx.selection import Selection, Selector
from glass_mlx.vocabulary import Shortlist

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as DenseResponse


@dataclass(frozen=True)
class Report:
    """How the model was sliced in one generation, up to the token that carries the report.

    Attributes:
        dense: whether the dense model computed this token.
        max_kl: the bound on KL that decided the density, in nats per token, or None.
        density: the share of neurons asked for.
        vocabulary: the share of the vocabulary asked for.
        density_got: the share of the neurons that a token reads in the slices; 1 before there are
            slices.
        vocabulary_got: the share of the vocabulary in the slices; 1 before there are slices.
        outside: the probability that is expected outside of this share, 0 before there are slices.
            Where drafts are checked, this is how likely a draft is to be wrong.
        prior_weight: λ, the weight of the prior; 1 if only one token was read, 0 without a prior.
        statistic: the statistic that ranks neurons locally.
        prior_statistic: the statistic that ranks neurons in the prior.
        prior: the prior's file, "given" for a prior made in this process, or "none"; with a remark
            if the prior was measured on a related model.
        down_policy: how quantized down projections are sliced; several policies, separated by
            commas, if the one asked for does not suit every layer.
        dense_tokens: generated tokens that the dense model computed; at a bound of 0, those that
            were not drafted.
        read_bytes: bytes of weights that were read for all generated tokens, for drafts and checks,
            too. With a draft model, this is what passes read if each computes one token, so an
            upper bound, without the draft model's own.
        checked_tokens: generated tokens that came from a check: right drafts, and the tokens that
            replaced wrong ones.
        drafts: how many tokens were drafted, with those that were wrong or void.
        selections: how many times neurons, or the tokens of drafts, were chosen.
        select_time: seconds spent on ranking, fusing and selecting.
        slice_time: seconds spent on slicing the weights.
        dense_bytes: bytes of weights that the dense model reads per token.
        sliced_bytes: bytes of weights that the sliced model reads per token; the same as
            `dense_bytes` before there are slices.
        held_bytes: bytes of arrays in this process after the latest slicing: dense weights unless
            they were released, slices and cache.
        selection: the kept neurons of each FFN, or None before they are selected.
        shortlist: the kept tokens of the vocabulary, or None if all are kept.
        unsliced: the FFNs that are not sliced because memory has no room for their slices.
    """

    dense: bool
    max_kl: float | None
    density: float
    vocabulary: float
    density_got: float
    vocabulary_got: float
    outside: float
    prior_weight: float
    statistic: str
    prior_statistic: str
    prior: str
    down_policy: str
    dense_tokens: int
    read_bytes: int
    checked_tokens: int
    drafts: int
    selections: int
    select_time: float
    slice_time: float
    dense_bytes: int
    sliced_bytes: int
    held_bytes: int
    selection: Selection | None = field(repr=False)
    shortlist: Shortlist | None = field(default=None, repr=False)
    unsliced: frozenset[str] = frozenset()

    def bytes_per_token(self, tokens: int) -> int:
        """Return the bytes of weights that a sliced token reads: with drafts, the mean so far.

        Args:
            tokens: the number of generated tokens.
        """
        return round(self.read_bytes / tokens) if self.drafts else self.sliced_bytes


@dataclass
class GenerationResponse(DenseResponse):
    """mlx-lm's response, with a report on the slicing in `glass`."""

    glass: Report | None = None


class Reporter:
    """The report of a generation, updated at every step.

    Args:
        selector: chooses the neurons.
        dense_bytes: bytes of weights that the dense model reads per token.
        down_policy: how quantized down projections are sliced.
        unsliced: the FFNs that are not sliced because there is no room.

    Attributes:
        report: the current report.
    """

    def __init__(
        self,
        selector: Selector,
        dense_bytes: int,
        down_policy: str,
        unsliced: Collection[str] = (),
    ) -> None:
        config, prior, self._read_shares = selector.config, selector.prior, selector.read_shares
        self.report = Report(
            dense=True,
            max_kl=selector.budget.max_kl if selector.budget else None,
            density=config.shares.density,
            vocabulary=config.shares.vocabulary,
            density_got=1.0,
            vocabulary_got=1.0,
            outside=0.0,
            prior_weight=0.0,
            statistic=config.statistic,
            prior_statistic=config.prior_statistic,
            prior=prior.title if prior else "none",
            down_policy=down_policy,
            dense_tokens=0,
            read_bytes=0,
            checked_tokens=0,
            drafts=0,
            selections=0,
            select_time=0.0,
            slice_time=0.0,
            dense_bytes=dense_bytes,
            sliced_bytes=dense_bytes,
            held_bytes=mx.get_active_memory(),
            selection=None,
            unsliced=frozenset(unsliced),
        )

    def token(self, dense: bool, is_checked: bool = False) -> Report:
        """Count a token, and return the report to yield with the token.

        Args:
            dense: whether the dense model computed it.
            is_checked: whether it came from a check, whose bytes `drafts` has counted.
        """
        report = self.report
        read = report.dense_bytes if dense else report.sliced_bytes
        self.report = replace(
            report,
            dense=dense,
            dense_tokens=report.dense_tokens + dense,
            read_bytes=report.read_bytes + (0 if is_checked else read),
            checked_tokens=report.checked_tokens + is_checked,
        )
        return self.report

    def drafts(self, count: int, read: int) -> None:
        """Count drafts, also of tokens that are read again, and the bytes that were read for them.

        Args:
            count: the number of drafts.
            read: the bytes of weights, with those of checks.
        """
        drafts, read_bytes = self.report.drafts + count, self.report.read_bytes + read
        self.report = replace(self.report, drafts=drafts, read_bytes=read_bytes)

    def slices(
        self,
        selection: Selection,
        shortlist: Shortlist | None,
        prior_weight: float,
        sliced_bytes: int,
    ) -> None:
        """Record new slices."""
        self.report = replace(
            self.report,
            density_got=selection.read_density(self._read_shares),
            vocabulary_got=shortlist.share if shortlist else 1.0,
            outside=shortlist.outside if shortlist else 0.0,
            prior_weight=prior_weight,
            selections=self.report.selections + 1,
            sliced_bytes=sliced_bytes,
            held_bytes=mx.get_active_memory(),
            selection=selection,
            shortlist=shortlist,
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that a block takes to one of the report's times."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.report = replace(self.report, **{name: getattr(self.report, name) + elapsed})


def memory_note(report: Report) -> str | None:
    """Say how many layers are sliced, and what to do about it, if memory has no room for all."""
    if not report.unsliced or report.selection is None:
        return None
    kept, widths = report.selection.indices, report.selection.widths
    is_stack = any(kept[path].ndim == 2 for path in report.unsliced)
    alike = [path for path in kept if kept[path].ndim == 2 or not is_stack]
    sliced = sum(kept[path].shape[-1] < widths[path] for path in alike)
    total = sliced + len(report.unsliced.intersection(alike))
    parts = "experts" if is_stack else "feed-forward networks"
    return (
        f"{parts} of {sliced} of {total} layers are sliced: memory has no "
        "room for more beside the model. For all of them, free the dense weights with "
        "--release-dense, or save a smaller model once with glass-mlx export"
    )


def summary(response: GenerationResponse) -> str:
    """Return the closing lines of a generation: mlx-lm's, and two to four on the slicing."""
    glass = response.glass
    assert glass is not None
    expectation = ""
    drafts = f"; {glass.checked_tokens} tokens took {glass.drafts} drafts" if glass.drafts else ""
    if glass.max_kl == 0:
        expectation = f"\nGLASS: the text is the model's own{drafts}"
    elif glass.max_kl is not None:
        expectation = f"\nGLASS: KL is expected to stay within {glass.max_kl:g} nats per token"
        expectation += drafts
    meaning = "probability of a wrong draft" if glass.drafts else "probability outside"
    kept = f"vocabulary {glass.vocabulary_got:.3f}, {meaning} {glass.outside:.4f}"
    if glass.max_kl != 0:
        kept = f"density {glass.density_got:.3f}, {kept}, λ {glass.prior_weight:.2f}"
    read = glass.read_bytes / response.generation_tokens
    note = memory_note(glass)
    memory = f"\nGLASS: {note}" if note else ""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"GLASS: {kept}, prior {glass.prior}, weights {glass.dense_bytes / 1e6:.1f} -> "
        f"{read / 1e6:.1f} MB per token\n"
        f"GLASS: {glass.dense_tokens} tokens dense, {glass.selections} selections: select "
        f"{glass.select_time:.3f} s, slice {glass.slice_time:.3f} s; "
        f"{glass.held_bytes / 1e9:.3f} GB held{expectation}{memory}"
    )
