"""What else can be done to read fewer bytes: quantizations, other checkpoints, and both sliced.

A rival takes the dense model's place, so it reads prompts itself. Slices do not: they come with the
dense model, which reads the prompt.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from glass_mlx.calibration.first_use import make_selector
from glass_mlx.checkpoints.loading import load, model_name
from glass_mlx.config import GlassConfig, Setting
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.quantizations import REFERENCE, Quantization, quantize
from glass_mlx.fidelity.scoring import DenseReading, Scores, score
from glass_mlx.fidelity.static import read_alone
from glass_mlx.models import named_arrays
from glass_mlx.models.precision import dequantize, set_dtype
from glass_mlx.prior.file import GlobalPrior, cache_name
from glass_mlx.selection import Selector
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class RivalChoice:
    """Which rivals to score.

    Attributes:
        quantizations: some of `quantizations.QUANTIZATIONS`.
        checkpoints: folders, GGUF files or hub ids of models with the same tokenizer: the same
            model quantized otherwise, an export of it, or a smaller one.
        sliced: whether each is also sliced, at every setting, where it has the model's shapes.
    """

    quantizations: Sequence[str] = ()
    checkpoints: Sequence[str] = ()
    sliced: bool = False

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.quantizations or self.checkpoints)


class Rival:
    """A model in the dense model's place.

    Args:
        name: the name of its rows.
        model: the model, in floats that a CPU multiplies fast.
        share: the bytes that it reads per token, over those of the dense model in its format.
        selectors: the selectors to slice it with, by setting; its rows have `sliced_name`.
    """

    def __init__(
        self, name: str, model: nn.Module, share: float, selectors: Mapping[Setting, Selector]
    ) -> None:
        self.name, self.share, self._selectors = name, share, selectors
        self._model = model

    @property
    def identity(self) -> str:
        """What tells it apart from other rivals, by name, weights and slices."""
        name = cache_name(self.name, Session.of(self._model).fingerprint)
        return f"{name}, sliced" if self._selectors else name

    @property
    def sliced_name(self) -> str:
        """The name of the rows of slices of it."""
        return f"default on {self.name}"

    def score(
        self, reading: DenseReading, text: Continuation
    ) -> Iterator[tuple[str, Setting, Scores]]:
        """Score the model and its slices on a continuation.

        Args:
            reading: the continuation, read by the dense model.
            text: the same continuation.

        Yields:
            The name and setting of a row, and its scores.
        """
        scores = Scores.exact(reading)
        everything = slice(0, reading.tokens)
        logprobs = read_alone(self._model, text, reading.dense.shape[-1])[1:]
        scores.put(everything, reading, logprobs, np.zeros(reading.tokens, bool))
        scores.bytes[:] = self.share
        yield self.name, Setting(), scores
        if not self._selectors:
            return
        warmups = {selector.config.warmup for selector in self._selectors.values()}
        points = [n for n in warmups if n < len(text.written)]
        own = DenseReading(self._model, text, points, reference=reading.dense)
        for setting, selector in self._selectors.items():
            scores = score(own, selector)
            scores.bytes *= self.share
            yield self.sliced_name, setting, scores


def make_rivals(
    choice: RivalChoice,
    session: Session,
    tokenizer: TokenizerWrapper,
    prior: GlobalPrior,
    settings: Iterable[Setting],
) -> list[Rival]:
    """Make the rivals of a model.

    Args:
        choice: which ones.
        session: the dense model's session.
        tokenizer: its tokenizer.
        prior: its prior, which selects in sliced rivals, too.
        settings: the settings of sliced rivals.

    Raises:
        FileNotFoundError: if a checkpoint does not exist.
        ValueError: if a quantization or checkpoint does not suit the model.
    """
    if not choice:
        return []
    quantized = {name: quantize(session.model, name) for name in choice.quantizations}
    reference = quantized.get(REFERENCE) or quantize(session.model, REFERENCE)
    models: dict[str, tuple[nn.Module, float]] = {
        f"{name} bits" if name.isdigit() else name: (q.model, q.bytes / reference.bytes)
        for name, q in quantized.items()
    }
    for name in choice.checkpoints:
        title = model_name(name)
        if title in models:
            raise ValueError(f"two rivals are called {title}; rename one")
        models[title] = _load_checkpoint(name, session, tokenizer, reference)
    rivals = []
    for title, (model, share) in models.items():
        selectors = {}
        if choice.sliced and Session.of(model).shapes == session.shapes:
            rival_session = Session.of(model)
            selectors = {
                setting: make_selector(
                    rival_session, tokenizer, prior, replace(GlassConfig(), **setting._asdict())
                )
                for setting in settings
            }
        rivals.append(Rival(title, model, share, selectors))
    return rivals


def _load_checkpoint(
    name: str, session: Session, tokenizer: TokenizerWrapper, reference: Quantization
) -> tuple[nn.Module, float]:
    """Load a checkpoint for scoring.

    Returns:
        The model in floats of the dense model's type, and its bytes as a share: of the dense
        model's at 4 bits if it is quantized, and otherwise of the dense model's in the same floats.

    Raises:
        ValueError: if its tokenizer is another one.
    """
    model, other = load(name)
    size = Session.of(model).vocabulary_size
    if other.get_vocab() != tokenizer.get_vocab() or size < session.vocabulary_size:
        raise ValueError(f"{name} has another tokenizer, so its probabilities cannot be compared")
    is_quantized = any("scales" in module for _, module in model.named_modules())
    read = Session.of(model).weight_bytes
    dequantize(model)
    set_dtype(model, _float_type(session.model))
    mx.eval(model.parameters())
    if is_quantized:
        return model, read / reference.bytes
    return model, Session.of(model).weight_bytes / _float_bytes(session)


def _float_type(model: nn.Module) -> mx.Dtype:
    arrays = (array for _, array in named_arrays(model))
    return next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def _float_bytes(session: Session) -> int:
    """Return the bytes that the dense model reads per token in floats."""
    if not any("scales" in module for _, module in session.model.named_modules()):
        return session.weight_bytes
    raise ValueError("a checkpoint in floats is compared with a model in floats; add --dequantize")
