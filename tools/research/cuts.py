"""Score cuts of a model that the engine does not have, by masks in place of slices.

A cut is a function that makes a function for each text. The latter maps a number of generated
tokens to the model that decodes from there on. Warm-up, renewals, and slices that are kept because
they hardly change are those of the engine.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glass_mlx import GlassConfig, Session, load
from glass_mlx.calibration.first_use import find_or_measure_prior
from glass_mlx.calibration.texts import Recipe, chat_frame, make_source
from glass_mlx.fidelity.prompts import Continuation, WritingSettings, continue_all, read_prompts
from glass_mlx.fidelity.scoring import DenseReading
from glass_mlx.models import with_modules
from glass_mlx.renewal import all_selection_points, sliced_stretches
from glass_mlx.selection import Selector, densities, neurons_to_keep
from glass_mlx.statistics import MEAN, LocalStatistics
from glass_mlx.writing import Writer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from continuations import PROMPTS
from mlx_lm.tokenizer_utils import TokenizerWrapper

CONFIG = GlassConfig()
SHRINKAGE_TOKENS = 16
MIN_OVERLAP = 0.95
MIN_TOKENS = 32

# How many texts are written at once. A text depends on it.
WRITTEN = 12

Decoder = Callable[[int], nn.Module]


class Masked(nn.Module):
    """A projection some of whose inputs are replaced by constants."""

    def __init__(self, layer: nn.Module, kept: np.ndarray, constants: np.ndarray) -> None:
        super().__init__()
        self.layer = layer
        self._mask = mx.array(kept.astype(np.float32))
        self._constants = mx.array(np.where(kept, 0, constants).astype(np.float32))

    def __call__(self, x: mx.array) -> mx.array:
        """Project (..., in), with the constants in place of the inputs that are not kept."""
        return self.layer(x * self._mask + self._constants)


class Reference(DenseReading):
    """A continuation as the dense model reads it, with what a fast KL needs.

    Attributes:
        text: the continuation.
        probabilities: (T, vocabulary) the dense model's.
        negative_entropy: (T,) sum of p log p.
    """

    def __init__(self, session: Session, text: Continuation) -> None:
        super().__init__(session, text, all_selection_points([CONFIG], len(text.written)))
        self.text = text
        self.probabilities = mx.exp(self.dense)
        self.negative_entropy = (self.probabilities * self.dense).sum(-1)
        mx.eval(self.probabilities, self.negative_entropy)
        del self.dense

    def kl(self, model: nn.Module, start: int, stop: int) -> np.ndarray:
        """Return the KL of a model that decodes the scored tokens from start to stop."""
        p = self.probabilities[start:stop]
        q = self.follow(model, start, stop)  # log-probabilities
        cross = (p[:, None] @ q[:, :, None]).reshape(-1)
        return np.array(self.negative_entropy[start:stop] - cross)


def kl(reference: Reference, decoder: Decoder) -> np.ndarray:
    """Return the KL (T,) of a cut on a text, zero where the engine decodes densely."""
    out = np.zeros(reference.tokens)
    for start, stop in sliced_stretches(CONFIG, reference.tokens + 1):
        out[start - 1 : stop - 1] = reference.kl(decoder(start), start - 1, stop - 1)
    return out


def means(local: LocalStatistics) -> dict[str, np.ndarray]:
    """Return the shrunk means of hidden vectors by FFN."""
    trust = local.text.tokens / (local.text.tokens + SHRINKAGE_TOKENS)
    return {path: mean * trust for path, mean in local.text.scores(MEAN).items()}


def counts(selector: Selector, widths: Mapping[str, int], density: float) -> dict[str, int]:
    """Return how many neurons the engine keeps of each FFN, in multiples of 32."""
    kept_dense = selector.prior.kept_dense if selector.prior else ()
    shares = densities(widths, density, kept_dense)
    return {path: neurons_to_keep(widths[path], share, 32) for path, share in shares.items()}


def keep(scores: np.ndarray, count: int) -> np.ndarray:
    """Return flags (m,) of the neurons with the largest scores."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


class FFNCut:
    """The FFNs' neurons with the largest fused scores, as the engine keeps them.

    Args:
        reference: the text.
        selector: ranks the neurons.
        budget: the number of neurons that each FFN keeps.
    """

    def __init__(self, reference: Reference, selector: Selector, budget: Mapping[str, int]) -> None:
        self._reference, self._selector, self._budget = reference, selector, budget
        self._kept: dict[str, np.ndarray] = {}
        self._modules: dict[str, dict[str, nn.Module]] = {}

    def modules(self, generated: int) -> dict[str, dict[str, nn.Module]]:
        """Return what replaces the down projections after some generated tokens."""
        local = self._reference.statistics(generated)
        scores, constants = self._selector.fuse(local), means(local)
        for ffn in self._reference.session.ffns:
            path, count = ffn.path, self._budget[ffn.path]
            kept, before = keep(scores[path], count), self._kept.get(path)
            if before is None or (kept & before).sum() < MIN_OVERLAP * count:
                name, down = ffn.contract
                self._kept[path] = kept
                self._modules[path] = {name: Masked(down, kept, constants[path])}
        return self._modules

    def __call__(self, generated: int) -> nn.Module:
        """Return the model that decodes after some generated tokens."""
        return with_modules(self._reference.session.model, self.modules(generated))


def open_model(path: str | None) -> tuple[Session, TokenizerWrapper, Selector]:
    """Load a model in float32, and return it with the engine's default ranking."""
    model, tokenizer = load(path or None, dtype="float32", dequantize=True)
    session = Session.of(model)
    prior = find_or_measure_prior(session, tokenizer)
    return session, tokenizer, session.selector(CONFIG, prior)


def _stored(file: Path | None, write: Callable[[], list[Continuation]]) -> list[Continuation]:
    if file is not None and file.exists():
        return [Continuation(*pair) for pair in json.loads(file.read_text())]
    texts = write()
    if file is not None:
        file.write_text(json.dumps([[text.prompt, text.written] for text in texts]))
    return texts


def development_texts(
    session: Session, tokenizer: TokenizerWrapper, count: int, file: Path | None = None
) -> list[Reference]:
    """Have the dense model continue the first development prompts by up to 192 tokens."""

    def write() -> list[Continuation]:
        prompts = read_prompts(PROMPTS)[:count]
        return continue_all(session.model, tokenizer, prompts, WritingSettings(192, 0.7, 0))

    texts = _stored(file, write)
    return [Reference(session, text) for text in texts if len(text.written) >= MIN_TOKENS]


def own_texts(
    session: Session, tokenizer: TokenizerWrapper, count: int, file: Path | None = None
) -> list[Reference]:
    """Have the model write texts as the calibration of a density curve does, with another seed."""

    def write() -> list[Continuation]:
        try:
            frame = chat_frame(tokenizer)
        except ValueError:
            frame = None
        writer = Writer(session.model, 0.7, [1, 0, 0], lambda tokens: None)
        recipe = Recipe("bos" if frame is None else "chat")
        source = make_source(recipe, writer, tokenizer, 192, frame)
        starts = [(text, text.mask.index(1)) for text in source(count, 0)]
        return [Continuation(text.tokens[:n], text.tokens[n:]) for text, n in starts]

    texts = _stored(file, write)
    return [Reference(session, text) for text in texts if len(text.written) >= 2 * MIN_TOKENS]


def score(
    texts: Sequence[Reference], make: Callable[[Reference], Decoder]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of KL and the number of scored tokens of each text."""
    sums = np.array([kl(text, make(text)).sum() for text in texts])
    return sums, np.array([text.tokens for text in texts])


def interval(
    ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray, resamples: int = 10000
) -> tuple[float, float, float]:
    """Return the difference of two mean KLs, and its 95 % bootstrap interval over the texts."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(tokens), size=(resamples, len(tokens)))
    differences = (ours - theirs)[rows].sum(1) / tokens[rows].sum(1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float((ours - theirs).sum() / tokens.sum()), float(low), float(high)


def row(name: str, ours: np.ndarray, theirs: np.ndarray | None, tokens: np.ndarray) -> str:
    """Return a line of a Markdown table: the KL, and the difference from a baseline."""
    line = f"| {name} | {ours.sum() / tokens.sum():.4f} |"
    if theirs is None:
        return f"{line} |"
    difference, low, high = interval(ours, theirs, tokens)
    return f"{line} {difference:+.4f} ({low:+.4f} to {high:+.4f}) |"
