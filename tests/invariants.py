"""What must hold for every model whose FFNs can be sliced, and tiny models to check it on."""

import copy
from collections.abc import Callable

from glass_mlx.models import DOWN_POLICIES, FFN, Rest, find_ffns, with_modules, with_taps
from glass_mlx.models.ffn import LAYOUTS
from glass_mlx.selection import Selection
from glass_mlx.slicing import Slicer, slice_model
from glass_mlx.statistics import STATISTICS, NeuronStatistics

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for `tiny_model` whose 256 tokens are one letter each."""
    vocabulary = {chr(0x4E00 + i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=chr(0x4E01))


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '上' if m.role == 'user' else '下' }}{{ m.content }}不{% endfor %}"
    "{% if add_generation_prompt %}下{% endif %}"
)


def chat_tokenizer() -> TokenizerWrapper:
    """The letter tokenizer with a chat template: 上 a user's turn 不 下 the answer 不."""
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "不"
    tokenizer.chat_template = CHAT_TEMPLATE
    return TokenizerWrapper(tokenizer)


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    """Which modules and arrays a model is made of."""
    modules = [(path, id(module)) for path, module in model.named_modules()]
    return modules + [(path, id(array)) for path, array in tree_flatten(model.parameters())]


def random_selection(model: nn.Module, seed: int = 0, share: float = 0.5) -> Selection:
    """Keep random neurons, in whole multiples."""
    generator = np.random.default_rng(seed)
    indices, widths = {}, {}
    for ffn in find_ffns(model):
        kept = max(1, round(share * ffn.width / ffn.multiple)) * ffn.multiple
        chosen = generator.choice(ffn.width, kept, replace=False)
        indices[ffn.path], widths[ffn.path] = np.sort(chosen).astype(np.int32), ffn.width
    return Selection(indices, widths)


class Masked(nn.Module):
    """A projection whose dropped inputs are set to zero, or to given values."""

    def __init__(
        self, layer: nn.Module, kept: np.ndarray, width: int, rest: mx.array | None
    ) -> None:
        super().__init__()
        self.layer, self._rest = layer, mx.zeros(width) if rest is None else rest
        mask = np.zeros(width, np.float32)
        mask[kept] = 1
        self._mask = mx.array(mask)

    def __call__(self, x):
        return self.layer(mx.where(self._mask > 0, x, self._rest))


def masked_model(
    model: nn.Module, selection: Selection, rest: dict[str, mx.array] | None = None
) -> nn.Module:
    """The dense model with the dropped neurons replaced: what slicing must agree with."""
    masks = {}
    for ffn in find_ffns(model):
        (name, down), given = ffn.contract, (rest or {}).get(ffn.path)
        masks[ffn.path] = {name: Masked(down, selection.indices[ffn.path], ffn.width, given)}
    return with_modules(model, masks)


def statistics_of(
    model: nn.Module, chunks: list[mx.array], cached: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of a prompt that is read in chunks."""
    ffns = find_ffns(model)
    statistics = NeuronStatistics({ffn.path: ffn.width for ffn in ffns}, tuple(STATISTICS))
    tapped = with_taps(model, statistics.update)
    cache = make_prompt_cache(model) if cached else None
    for chunk in chunks:
        mx.eval(tapped(chunk, cache=cache), statistics.sums)
    return {name: statistics.scores(name) for name in STATISTICS}


def assert_same_scores(a: dict, b: dict) -> None:
    for name, scores in a.items():
        for path, values in scores.items():
            np.testing.assert_allclose(values, b[name][path], rtol=2e-4, atol=1e-6)


def check_invariants(model: nn.Module, forward: Callable[[nn.Module], mx.array]) -> None:
    """Check slicing and statistics on one model.

    Args:
        model: a model; it must be the same afterwards.
        forward: computes the logits of some tokens with a model like it.
    """
    before = snapshot(model)
    dense = forward(model)

    everything = random_selection(model, share=1.0)
    for policy in DOWN_POLICIES:
        assert mx.array_equal(forward(slice_model(model, everything, policy)), dense)

    selection = random_selection(model)
    sliced = forward(slice_model(model, selection, "scatter"))
    masked = forward(masked_model(model, selection))
    assert mx.linalg.norm(sliced - masked) < 1e-4 * mx.linalg.norm(masked)
    assert mx.linalg.norm(sliced - dense) > 1e-2 * mx.linalg.norm(dense)

    rest = {ffn.path: 0.1 * mx.random.normal((ffn.width,)) for ffn in find_ffns(model)}
    stand_ins = {path: Rest(values) for path, values in rest.items()}
    filled = forward(Slicer(model, "scatter")(selection, stand_ins)[0])
    masked = forward(masked_model(model, selection, rest))
    assert mx.linalg.norm(filled - masked) < 1e-4 * mx.linalg.norm(masked)
    assert mx.linalg.norm(filled - sliced) > 1e-2 * mx.linalg.norm(sliced)

    assert snapshot(model) == before
    assert mx.array_equal(forward(model), dense)


def reordered(ffn: FFN, order: np.ndarray) -> dict[str, nn.Module]:
    """The projections of an FFN with its neurons in another order."""
    rows, parts = mx.array(LAYOUTS[ffn.layout](order, ffn.width)), {}
    for name, layer in ffn.expand.items():
        parts[name] = copy.copy(layer)
        parts[name].weight = layer.weight[rows]
        if "bias" in layer:
            parts[name].bias = layer.bias[rows]
    name, down = ffn.contract
    parts[name] = copy.copy(down)
    parts[name].weight = down.weight[:, mx.array(order)]
    return parts


def check_statistics(model: nn.Module, tokens: mx.array) -> None:
    """Check that statistics do not depend on how a prompt (B, T) is read, but follow neurons."""
    whole = statistics_of(model, [tokens], cached=True)
    parts = [tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]]
    assert_same_scores(whole, statistics_of(model, parts, cached=True))
    assert_same_scores(whole, statistics_of(model, [tokens], cached=False))

    generator = np.random.default_rng(1)
    orders = {ffn.path: generator.permutation(ffn.width) for ffn in find_ffns(model)}
    permuted = {ffn.path: reordered(ffn, orders[ffn.path]) for ffn in find_ffns(model)}
    other = with_modules(model, permuted)
    moved = statistics_of(other, [tokens], cached=True)
    expected = {
        name: {path: values[orders[path]] for path, values in scores.items()}
        for name, scores in whole.items()
    }
    assert_same_scores(expected, moved)
    dense = model(tokens)
    assert mx.linalg.norm(other(tokens) - dense) < 1e-4 * mx.linalg.norm(dense)
