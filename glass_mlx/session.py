"""The facts about a model, found once and used by any number of generations."""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from glass_mlx.budget import Budget
from glass_mlx.config import DEFAULT_REFRESH, DRAFT_WARMUP, EXACT_REFRESH, GlassConfig
from glass_mlx.draft_shortlist import DRAFT_COUNTS, HeadCost
from glass_mlx.memory import without_room
from glass_mlx.models import (
    FFN,
    Division,
    Fingerprint,
    Head,
    ObservedLogits,
    Ranks,
    base_layer,
    check_tokens,
    division_of,
    find_ffns,
    find_head,
    named_arrays,
    read_shares,
    sample_weights,
    vocabulary_size,
    weight_bytes,
    with_taps,
)
from glass_mlx.prior.curves import conditions
from glass_mlx.prior.file import FILE_NAME, GlobalPrior, cached_priors, packaged_priors
from glass_mlx.prior.hub import PREFIX
from glass_mlx.prior.lookup import find_prior
from glass_mlx.selection import Selection, Selector
from glass_mlx.slicing import SlicedModel, slice_model
from glass_mlx.statistics import STATISTICS, LocalStatistics, Total, alone
from glass_mlx.token_observer import TokenObserver

import mlx.nn as nn

# In prefill, the last FFN runs only to be observed. This many tokens per chunk are enough.
_MAX_SAMPLES = 128


class _Facts:
    """The facts about a model, without a reference to the model itself.

    Args:
        model: the model.

    Attributes:
        division: how it is divided over several processes, or None if it is not.
        ffns: its FFNs in the order of the layers, as far as they are here.
        head: its head, or None if it cannot be sliced.
        read_shares: the share of its experts that a token reads, by stack.
        weight_bytes: the bytes of weights that it reads per token.
        vocabulary_size: the number of tokens that it knows.
        latest_prior: the result of the latest search for a prior.
    """

    def __init__(self, model: nn.Module) -> None:
        self.division = division_of(model)
        self.ffns = find_ffns(model)
        self.head = find_head(model)
        self.read_shares = read_shares(model, self.ffns)
        self.weight_bytes = weight_bytes(model, self.head, self.read_shares)
        self.vocabulary_size = self.head.size if self.head else vocabulary_size(model)
        self.latest_prior: _FoundPrior | None = None
        self._latest_part: tuple[GlobalPrior, GlobalPrior] | None = None
        self._arrays = [(path, weakref.ref(array)) for path, array in named_arrays(model)]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """A sample of the weights of each FFN."""
        return sample_weights(self.ffns, self.division)

    def part_of(self, prior: GlobalPrior) -> GlobalPrior:
        """Return a prior for the neurons in this process and the tokens of the head."""
        if self._latest_part is None or self._latest_part[0] is not prior:
            part = prior if self.division is None else prior.part(self.division.parts)
            if self.head is not None:
                part = part.with_vocabulary(self.head.size)
            self._latest_part = prior, part
        return self._latest_part[1]

    def matches(self, model: nn.Module) -> bool:
        """Return whether a model has the arrays that these facts were found with."""
        arrays = named_arrays(model)
        return len(arrays) == len(self._arrays) and all(
            path == known_path and array is known_array()
            for (path, array), (known_path, known_array) in zip(arrays, self._arrays, strict=True)
        )


# The keys are identities of models, because nn.Module cannot be the key of a dictionary. An entry
# is removed together with its model.
_facts_by_model: dict[int, tuple["weakref.ref[nn.Module]", _Facts]] = {}


def _facts_of(model: nn.Module) -> _Facts:
    """Return the facts about a model, and find them again if the model's arrays were replaced."""
    entry = _facts_by_model.get(id(model))
    if entry is not None:
        reference, facts = entry
        if reference() is model and facts.matches(model):
            return facts
    facts = _Facts(model)
    _facts_by_model[id(model)] = weakref.ref(model), facts
    weakref.finalize(model, _facts_by_model.pop, id(model), None)
    return facts


class Session:
    """The facts about a model: its FFNs, its fingerprint, its prior, its transposed copies.

    All sessions of one model share these facts and keep them for later generations. If arrays of
    the model are replaced, the facts are found again. A change within an array is not noticed.

    Args:
        model: a model from `load` or from `mlx_lm.load`.

    Attributes:
        model: the model.

    Raises:
        ValueError: if the model cannot be sliced, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._facts = _facts_of(model)

    @staticmethod
    def of(model: "nn.Module | Session") -> "Session":
        """Return a new session of a model, or update a given session and return it."""
        if not isinstance(model, Session):
            return Session(model)
        model._facts = _facts_of(model.model)
        return model

    @property
    def ffns(self) -> list[FFN]:
        """The FFNs of the model in the order of the layers, as far as they are in this process."""
        return self._facts.ffns

    @property
    def division(self) -> Division | None:
        """How the model is divided over several processes, or None if it is not."""
        return self._facts.division

    @property
    def ranks(self) -> Ranks:
        """The processes that the model is divided over; this one alone if it is not divided."""
        return self.division.ranks if self.division else Ranks()

    @property
    def total(self) -> Total:
        """Turns sums over the neurons in this process into sums over all; see `Total`."""
        return self.division.total if self.division else alone

    @property
    def whole_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The `shapes` of the whole model, of which this process may hold a part."""
        return self.division.shapes if self.division else self.shapes

    @property
    def head(self) -> Head | None:
        """The output head of the model, or None if it cannot be sliced."""
        return self._facts.head

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens that the model knows."""
        return self._facts.vocabulary_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape (m,) or (experts, m) of arrays over each FFN's neurons, by its path."""
        return {ffn.path: ffn.shape for ffn in self.ffns}

    @property
    def widths(self) -> dict[str, int]:
        """The number of neurons of each FFN, by its path."""
        return {ffn.path: ffn.width for ffn in self.ffns}

    @property
    def multiples(self) -> dict[str, int]:
        """The multiple that each FFN's number of kept neurons is rounded to, by its path."""
        return {ffn.path: ffn.multiple for ffn in self.ffns}

    @property
    def fingerprint(self) -> Fingerprint:
        """A sample of the weights of each FFN, which identifies the model."""
        return self._facts.fingerprint

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that the dense model reads per token."""
        return self._facts.weight_bytes

    def bytes_of(self, model: nn.Module) -> int:
        """Return the bytes of weights that a sliced model reads per token."""
        return weight_bytes(model, self.head, self._facts.read_shares)

    @property
    def read_shares(self) -> dict[str, float]:
        """The share of its experts that a token reads, by the path of each stack of experts."""
        return self._facts.read_shares

    @property
    def weight_format(self) -> str:
        """The number format of the FFNs' weights, such as "4-bit" or "float32"."""
        layers = [base_layer(layer) for ffn in self.ffns for layer in ffn.layers.values()]
        formats = {
            f"{layer.bits}-bit" if "scales" in layer else str(layer.weight.dtype).split(".")[-1]
            for layer in layers
        }
        return " and ".join(self._of_all_layers(formats))

    def _of_all_layers(self, names: Iterable[str]) -> list[str]:
        """Return names that apply to any layer of the model, sorted."""
        if self.division is not None and self.division.is_pipeline:
            names = chain.from_iterable(self.division.ranks.gather([*names]))
        return sorted({*names})

    @property
    def refresh(self) -> int:
        """The number of tokens after which the selection is first renewed by default.

        A renewal may change all neurons, but a token reads only a few experts, and says something
        about those alone. So both what a renewal costs in tokens, and the tokens after which as
        much is known about a neuron, are by that factor higher than in other models.
        """
        sizes = {ffn.path: sum(_bytes(layer) for layer in ffn.layers.values()) for ffn in self.ffns}
        read = sum(size * self.read_shares.get(path, 1.0) for path, size in sizes.items())
        ratio = self._over_layers(sum(sizes.values())) / self._over_layers(read)
        return DEFAULT_REFRESH * round(ratio)

    def _over_layers(self, value: float) -> float:
        """Return the sum of a value over the ranks of a pipeline, or the value without one."""
        if self.division is None or not self.division.is_pipeline:
            return value
        return sum(self.division.ranks.gather(value))

    @property
    def head_cost(self) -> HeadCost | None:
        """What the whole head costs, or None if it cannot be sliced; the same on all ranks."""
        if self.head is None:
            return None
        times = {count: self.head.time_of_rows(count) for count in DRAFT_COUNTS}
        return self.ranks.share(HeadCost(self.head.bytes / self.weight_bytes, times))

    def resolved(self, config: GlassConfig) -> GlassConfig:
        """Return a configuration with the values that depend on the model."""
        refresh = config.refresh
        if refresh is None:
            refresh = EXACT_REFRESH if config.is_exact else self.refresh
        warmup = min(config.warmup, DRAFT_WARMUP) if config.is_exact else config.warmup
        return replace(config, refresh=refresh, warmup=warmup)

    def conditions(self, config: GlassConfig) -> dict[str, Any]:
        """Return the conditions on which KL depends in addition to shares; see `conditions`."""
        if config.is_exact:  # with a schedule of its own, and without KL
            config = replace(config, density=1.0, vocabulary=1.0, max_kl=None)
        weights = self.weight_format
        if "bit" in weights:
            policies = self.sliced_model(config.down_policy).down_policy.split(", ")
            weights += f", {', '.join(self._of_all_layers(policies))}"
        return conditions(self.resolved(config), weights)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raise ValueError for the first token id that the model does not know."""
        check_tokens(tokens, self._facts.vocabulary_size)

    def find_prior(
        self,
        prior: GlobalPrior | str | Path | None = None,
        folder: Path | None = None,
        name: str = "MODEL",
        report: Callable[[str], object] = lambda line: None,
    ) -> GlobalPrior:
        """Find the model's prior and check that it fits.

        The latest prior is kept, and returned again for the same request as long as the places
        that were searched do not change.

        Args:
            prior: a prior, its file, or `hub:user/repo`, which is downloaded. Default: search the
                model's folder, the user's cache and this package, in this order.
            folder: the model's folder, if known.
            name: the model's name in the command that the error message suggests.
            report: called with a line for each place that was searched.

        Raises:
            FileNotFoundError: if the given file does not exist.
            NoPriorError: if there is no prior.
            ValueError: if the given prior, or the one in the model's folder, is damaged or belongs
                to another model, or if it cannot be downloaded.
        """
        if self.division is None or isinstance(prior, GlobalPrior):
            return self._find_prior(prior, folder, name, report)
        # Files are rank 0's. What all ranks must do together comes before that.
        lines, _ = list[str](), self.fingerprint
        match, lines = self.division.ranks.on_first(
            lambda: (self._find_prior(prior, folder, name, lines.append), lines)
        )
        for line in lines:
            report(line)
        return match

    def _find_prior(
        self,
        prior: GlobalPrior | str | Path | None,
        folder: Path | None,
        name: str,
        report: Callable[[str], object],
    ) -> GlobalPrior:
        """Find a prior in this process; see `find_prior`."""
        latest = self._facts.latest_prior
        if latest is not None and latest.answers(prior, folder):
            for line in latest.lines:
                report(line)
            return latest.match
        lines: list[str] = []

        def record(line: str) -> None:
            lines.append(line)
            report(line)

        match = find_prior(self.whole_shapes, self.fingerprint, prior, folder, name, record)
        states = _states(prior, folder, match)
        self._facts.latest_prior = _FoundPrior(match, prior, folder, states, tuple(lines))
        return match

    def selector(
        self,
        config: GlassConfig,
        prior: GlobalPrior | None,
        budget: Budget | None = None,
        always: Callable[[Sequence[int]], Collection[int]] = frozenset,
    ) -> Selector:
        """Return the selector for a configuration and a prior; see `Selector`.

        A bound that no slice of the FFNs stays within is taken for 0.
        """
        if budget is not None and budget.density == 1:
            config, budget = replace(config, max_kl=0.0), None
        size = self.head.size if self.head else 0
        part = None if prior is None else self._facts.part_of(prior)
        return Selector(
            self.resolved(config),
            self.multiples,
            size,
            part,
            budget,
            always,
            self.read_shares,
            self.whole_shapes,
        )

    def empty_statistics(self, names: Iterable[str] = STATISTICS) -> LocalStatistics:
        """Return local statistics without any tokens; see `LocalStatistics.empty`."""
        return LocalStatistics.empty(self.shapes, names, self.total)

    def observed_on_prompt(self, local: LocalStatistics) -> nn.Module:
        """Return the model with its FFNs observed for the statistics of the prompt."""
        return with_taps(self.model, local.prompt.update, max_samples=_MAX_SAMPLES, ffns=self.ffns)

    def observed_on_text(self, local: LocalStatistics) -> nn.Module:
        """Return the model with its FFNs observed for the statistics of the generated text."""
        text = local.text
        return with_taps(self.model, text.update, text.update_outputs, ffns=self.ffns)

    def observed_by_token(self, observer: TokenObserver, with_ffns: bool = True) -> ObservedLogits:
        """Return the model with its logits, and its FFNs or not, observed for single tokens."""
        ffns = self.ffns if with_ffns else []
        model = with_taps(self.model, observer.hidden, observer.outputs, ffns=ffns)
        return ObservedLogits(model, observer.logits)

    def without_room(self, selector: Selector, required: bool = True) -> frozenset[str]:
        """Return the FFNs whose slices do not fit into memory; see `memory.without_room`.

        Args:
            selector: determines how many neurons each slice keeps, and how it is made.
            required: whether at least one slice must fit.

        Raises:
            NoRoomError: if one must, and none does.
        """
        counts, policy = selector.counts(self.shapes), selector.config.down_policy
        shares = {path: counts[path] / width for path, width in self.widths.items()}
        size, read = _bytes(self.model), self.read_shares
        return without_room(size, self.ffns, shares, policy, read, required)

    def sliced_model(
        self,
        down_policy: str,
        reload: Callable[[], nn.Module] | None = None,
        unsliced: Collection[str] = (),
    ) -> SlicedModel:
        """Return a sliced model that has no slices yet; see `SlicedModel`."""
        return SlicedModel(self.model, self.ffns, down_policy, reload, self.head, unsliced)

    def slice(self, selection: Selection, down_policy: str) -> nn.Module:
        """Return a model that computes only the selected neurons."""
        return slice_model(self.model, selection, down_policy, self.ffns)


def _bytes(layer: nn.Module) -> int:
    return sum(array.nbytes for _, array in named_arrays(layer))


Request = GlobalPrior | str | Path | None


@dataclass(frozen=True)
class _FoundPrior:
    """A prior, the request that it answers, and the state of the places that were searched."""

    match: GlobalPrior
    request: Request
    folder: Path | None
    states: tuple[Any, ...]
    lines: tuple[str, ...]

    def answers(self, request: Request, folder: Path | None) -> bool:
        """Return whether a search for a request would find the same prior again."""
        if isinstance(request, GlobalPrior):
            return request is self.request
        if str(request).startswith(PREFIX):
            return False  # the hub may have a newer one
        return (request, folder, _states(request, folder, self.match)) == (
            self.request,
            self.folder,
            self.states,
        )


def _states(request: Request, folder: Path | None, match: GlobalPrior) -> tuple[Any, ...]:
    """Return the states of all files and folders on which a search depends."""
    places = [] if request is not None else [cached_priors(), packaged_priors()]
    if folder is not None:
        places.append(folder / FILE_NAME)
    return tuple(map(_state, [*places, Path(match.source)]))


def _state(path: Path) -> tuple[Any, ...]:
    """Return a path, its modification time and its size, or the path alone if it is missing."""
    try:
        state = path.stat()
    except OSError:
        return (path,)
    return path, state.st_mtime_ns, state.st_size


def resolve_prior(
    model: nn.Module | Session,
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it fits; see `Session.find_prior`.

    Args:
        model: the model, or a session of it.
        prior: see `Session.find_prior`, also for the other arguments and the errors.
        folder: the model's folder, if known.
        name: the model's name in the command that the error message suggests.
        report: called with a line for each place that was searched.
    """
    return Session.of(model).find_prior(prior, folder, name, report)
