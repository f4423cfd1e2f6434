"""What is known of a model, found once and used by any number of generations."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glass_mlx.config import GlassConfig
from glass_mlx.files import cache_folder
from glass_mlx.models import find_ffns, fingerprint, named_arrays, weight_bytes, with_taps
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prior.lookup import find_prior
from glass_mlx.selection import Selection, Selector
from glass_mlx.slicing import SlicedModel, slice_model
from glass_mlx.statistics import STATISTICS, LocalStatistics

import mlx.nn as nn
import numpy as np

# In prefill, the last FFN computes only what is observed; this many tokens per chunk are enough.
_MAX_SAMPLES = 128

# The attribute of a model that holds its session.
_ATTRIBUTE = "_glass_session"


class Session:
    """What is known of a model: its FFNs, its fingerprint, its prior, its transposed copies.

    Everything is found when it is first needed and kept for later generations. A session is valid
    while the model's arrays stay the same objects; see `is_current`.

    Args:
        model: a model from `load` or from `mlx_lm.load`.

    Attributes:
        model: the model.
        ffns: its FFNs in the order of the layers.
        widths: the number of neurons of each FFN, by its path.
        multiples: what each FFN's number of kept neurons is rounded to.

    Raises:
        ValueError: if the model cannot be sliced, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ffns = find_ffns(model)
        self.widths = {ffn.path: ffn.width for ffn in self.ffns}
        self.multiples = {ffn.path: ffn.multiple for ffn in self.ffns}
        self._arrays = [(path, weakref.ref(array)) for path, array in named_arrays(model)]
        self._latest: _FoundPrior | None = None

    @staticmethod
    def of(model: "nn.Module | Session") -> "Session":
        """Return the session of a model, which is kept as an attribute of the model.

        A session in place of the model is returned as it is.
        """
        if isinstance(model, Session):
            return model
        session = getattr(model, _ATTRIBUTE, None)
        # A shallow copy of a model has the attribute, too, but is another model.
        if session is None or session.model is not model or not session.is_current():
            session = Session(model)
            setattr(model, _ATTRIBUTE, session)
        return session

    def is_current(self) -> bool:
        """Whether the model still has the arrays that it had when the session was made."""
        arrays = named_arrays(self.model)
        return len(arrays) == len(self._arrays) and all(
            path == known_path and array is known_array()
            for (path, array), (known_path, known_array) in zip(arrays, self._arrays, strict=True)
        )

    @cached_property
    def fingerprint(self) -> dict[str, np.ndarray]:
        """A sample of the weights of each FFN; see `models.fingerprint`."""
        return fingerprint(self.model, self.ffns)

    @cached_property
    def weight_bytes(self) -> int:
        """The bytes of weights that the dense model reads for one token."""
        return weight_bytes(self.model)

    def find_prior(
        self,
        prior: GlobalPrior | str | Path | None = None,
        folder: Path | None = None,
        name: str = "MODEL",
        report: Callable[[str], object] = lambda line: None,
    ) -> GlobalPrior:
        """Find the model's prior and check that it fits; see `prior.lookup.find_prior`.

        The latest prior is kept, and returned again for the same arguments while its file stays
        the same.
        """
        identity = id(prior) if isinstance(prior, GlobalPrior) else prior
        request = (identity, folder, cache_folder())
        if self._latest is None or self._latest.key != (request, _file_state(self._latest.prior)):
            found = find_prior(self.widths, self.fingerprint, prior, folder, name, report)
            self._latest = _FoundPrior((request, _file_state(found)), found)
        return self._latest.prior

    def selector(self, config: GlassConfig, prior: GlobalPrior | None) -> Selector:
        """Return what chooses neurons by a configuration and a prior; see `Selector`."""
        return Selector(config, self.multiples, prior)

    def empty_statistics(self, names: Iterable[str] = STATISTICS) -> LocalStatistics:
        """Return local statistics without any tokens; see `LocalStatistics.empty`."""
        return LocalStatistics.empty(self.widths, names)

    def observed_on_prompt(self, local: LocalStatistics) -> nn.Module:
        """Return the model with its FFNs observed for the statistics of the prompt."""
        return with_taps(self.model, local.prompt.update, max_samples=_MAX_SAMPLES, ffns=self.ffns)

    def observed_on_text(self, local: LocalStatistics) -> nn.Module:
        """Return the model with its FFNs observed for the statistics of the generated text."""
        return with_taps(self.model, local.text.update, local.text.update_outputs, ffns=self.ffns)

    def sliced_model(
        self, down_policy: str, reload: Callable[[], nn.Module] | None = None
    ) -> SlicedModel:
        """Return a sliced model without slices yet; see `SlicedModel`."""
        return SlicedModel(self.model, self.ffns, down_policy, reload)

    def slice(self, selection: Selection, down_policy: str) -> nn.Module:
        """Return a model that computes only the selected neurons."""
        return slice_model(self.model, selection, down_policy, self.ffns)


@dataclass(frozen=True)
class _FoundPrior:
    """A prior, and what it was found by."""

    key: tuple[Any, ...]
    prior: GlobalPrior


def _file_state(prior: GlobalPrior) -> tuple[int, int] | None:
    """Return the modification time and size of a prior's file, or None without a file."""
    try:
        state = Path(prior.source).stat() if prior.source else None
    except OSError:
        state = None
    return None if state is None else (state.st_mtime_ns, state.st_size)


def resolve_prior(
    model: nn.Module | Session,
    prior: GlobalPrior | str | Path | None = None,
    folder: Path | None = None,
    name: str = "MODEL",
    report: Callable[[str], object] = lambda line: None,
) -> GlobalPrior:
    """Find a model's prior and check that it fits.

    Args:
        model: the model, or a session of it.
        prior: a prior, its file, or `hub:user/repo`, which is downloaded. Default: search the
            model's folder, the user's cache and this package, in this order.
        folder: the model's folder, if known.
        name: the user's name for the model, for the command that builds a prior.
        report: called with a line for each place that was searched.

    Raises:
        FileNotFoundError: if the given file does not exist.
        NoPriorError: if there is no prior.
        ValueError: if the given prior, or the one in the model's folder, is damaged or belongs to
            another model, or if it cannot be downloaded.
    """
    return Session.of(model).find_prior(prior, folder, name, report)
