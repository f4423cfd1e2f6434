"""Stacks of routed experts: finding, observing, slicing and renewing them."""

import copy

from glass_mlx.models import DOWN_POLICIES, FFN, MeanCompensation, find_ffns, with_taps
from glass_mlx.models.architectures import tiny_model
from glass_mlx.models.linear import dense_weight
from glass_mlx.selection import Selection
from glass_mlx.slicing import SlicedModel
from glass_mlx.statistics import NeuronStatistics
from helpers import (
    QUANTIZATION_MODES,
    check_invariants,
    check_statistics,
    random_selection,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

SIZES = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 256}
TOKENS = mx.array([[1, 7, 3, 200, 9, 54, 21], [5, 4, 3, 2, 1, 0, 255]])


class FusedExperts(nn.Module):
    """A stack whose gate and up are one matrix per expert, in two halves or interleaved."""

    def __init__(self, layout):
        super().__init__()
        self._layout = layout
        self.gate_up = SwitchLinear(64, 512, 4, bias=True)
        self.down = SwitchLinear(256, 64, 4, bias=True)
        for layer in (self.gate_up, self.down):
            layer.bias = mx.random.normal(layer.bias.shape)

    def __call__(self, x, experts):
        h = self.gate_up(mx.expand_dims(x, (-2, -3)), experts)
        if self._layout == "halves":
            gate, up = mx.split(h, 2, axis=-1)
        else:
            gate, up = h[..., ::2], h[..., 1::2]
        return self.down(nn.silu(gate) * up, experts).squeeze(-2)


class Mixture(nn.Module):
    """A model that consists of one mixture of experts."""

    def __init__(self, experts):
        super().__init__()
        self.model_type = "mixture"
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = experts

    def __call__(self, x):
        gates = self.router(x)
        chosen = mx.argpartition(-gates, kth=1, axis=-1)[..., :2]
        scores = mx.softmax(mx.take_along_axis(gates, chosen, axis=-1), axis=-1)
        return (self.experts(x, chosen) * scores[..., None]).sum(-2)


class NormalizedExperts(SwitchGLU):
    """Experts that normalize over their neurons, which cannot be sliced."""

    def __call__(self, x, indices):
        x = mx.expand_dims(x, (-2, -3))
        hidden = nn.silu(self.gate_proj(x, indices)) * self.up_proj(x, indices)
        return self.down_proj(mx.fast.rms_norm(hidden, None, 1e-5), indices).squeeze(-2)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("tokens", [5, 50])
def test_stacks_with_gate_and_up_in_one(layout, tokens):
    mx.random.seed(0)
    model, x = Mixture(FusedExperts(layout)), mx.random.normal((1, tokens, 64))
    (ffn,) = find_ffns(model)
    assert (ffn.kind, ffn.shape) == (f"gate and up in one, {layout} experts", (4, 256))
    check_invariants(model, lambda m: m(x))
    sliced, selection = SlicedModel(model, [ffn], "requantize"), random_selection(model)
    sliced.update(selection)
    other = random_selection(model, seed=1)
    sliced.update(other)
    fresh = SlicedModel(model, [ffn], "requantize")
    fresh.update(other)
    assert mx.allclose(sliced.model(x), fresh.model(x), atol=1e-5)


def test_experts_that_mix_their_neurons_are_refused():
    with pytest.raises(ValueError, match="routed experts"):
        find_ffns(Mixture(NormalizedExperts(64, 128, 4)))


@pytest.mark.parametrize(("mode", "group", "bits"), QUANTIZATION_MODES)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_invariants_of_quantized_experts(architecture, mode, group, bits):
    sizes = SIZES if architecture == "qwen3_moe" else {**SIZES, "intermediate_size": 256}
    model = tiny_model(architecture, **sizes)
    nn.quantize(model, group, bits, mode=mode)
    check_invariants(model, lambda m: m(TOKENS))
    ffn = find_ffns(model)[0]
    for layer in ffn.expand.values():  # rows are exact
        kept = random_selection(model).indices[ffn.path]
        sliced = ffn.sliced(kept, "scatter")
        rows = mx.take_along_axis(dense_weight(layer), mx.array(kept)[..., None], axis=1)
        (name,) = (n for n, candidate in ffn.expand.items() if candidate is layer)
        assert mx.array_equal(dense_weight(sliced[name]), rows)


def test_the_moe_block_beside_a_dense_ffn_is_found():
    model = tiny_model(
        "gemma4_text", enable_moe_block=True, num_experts=4, top_k_experts=2, **SIZES
    )
    assert [ffn.kind for ffn in find_ffns(model)][:2] == ["gated experts", "gated"]
    check_invariants(model, lambda m: m(TOKENS))
    check_statistics(model, TOKENS)


def routed_model(bits=None, architecture="gpt_oss"):
    model = tiny_model(architecture, **SIZES, intermediate_size=256)
    if bits:
        nn.quantize(model, 32, bits)
    for ffn in find_ffns(model):
        for layer in ffn.layers.values():
            if "bias" in layer:
                layer.bias = mx.random.normal(layer.bias.shape)
    return model


def with_other_neurons(selection, path, expert, count, seed=0):
    """Return a selection in which one expert of a stack has `count` other neurons."""
    rng, indices = np.random.default_rng(seed), selection.indices[path].copy()
    kept = rng.permutation(indices[expert])[count:]
    others = np.setdiff1d(np.arange(selection.widths[path]), indices[expert])
    indices[expert] = np.sort([*kept, *rng.permutation(others)[:count]])
    return Selection(selection.indices | {path: indices}, selection.widths)


@pytest.mark.parametrize(
    ("bits", "policy"), [(None, "requantize"), *((4, policy) for policy in DOWN_POLICIES)]
)
@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe", "phixtral"])
def test_a_renewed_stack_computes_the_same_as_a_new_one(architecture, bits, policy):
    model = routed_model(bits, architecture)
    ffns, selection = find_ffns(model), random_selection(model)
    sliced = SlicedModel(model, ffns, policy)
    sliced.update(selection)
    for turn in range(3):
        for path in selection.indices:
            for expert in (0, 2 + turn % 2):
                selection = with_other_neurons(selection, path, expert, 20 + turn, turn)
        means = {f.path: MeanCompensation(0.1 * mx.random.normal(f.shape)) for f in ffns}
        sliced.update(selection, means if turn != 1 else None)
        fresh = SlicedModel(model, ffns, policy)
        fresh.update(selection, means if turn != 1 else None)
        for path, indices in sliced.selection.indices.items():
            assert np.array_equal(indices, selection.indices[path])
        if turn == 0:  # later, experts that did not change keep their older compensation
            error = mx.linalg.norm(sliced.model(TOKENS) - fresh.model(TOKENS))
            tolerance = 0.1 if bits and policy == "requantize" else 1e-4
            assert error < tolerance * mx.linalg.norm(fresh.model(TOKENS))


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe"])
def test_experts_that_change_without_compensation_lose_it(architecture):
    model = routed_model(None, architecture)
    (ffn, *_), selection = find_ffns(model), random_selection(model)
    sliced = SlicedModel(model, [ffn], "requantize")
    sliced.update(selection, {ffn.path: MeanCompensation(0.1 * mx.random.normal(ffn.shape))})
    before = mx.array(sliced.slices[ffn.path][1]["down_proj"].bias)
    sliced.update(with_other_neurons(selection, ffn.path, 2, 40))
    after = sliced.slices[ffn.path][1]["down_proj"].bias
    own = ffn.contract[1].get("bias", mx.zeros(after.shape))
    assert mx.array_equal(after[2], own[2])
    assert mx.array_equal(after[mx.array([0, 1, 3])], before[mx.array([0, 1, 3])])
    assert not mx.allclose(after[0], own[0], atol=1e-3)


@pytest.mark.parametrize("policy", DOWN_POLICIES)
def test_a_renewal_moves_only_rows_of_the_experts_that_changed(policy):
    model = routed_model(4)
    (ffn, *_), selection = find_ffns(model), random_selection(model)
    sliced = SlicedModel(model, [ffn], policy)
    means = {ffn.path: MeanCompensation(0.1 * mx.random.normal(ffn.shape))}
    sliced.update(selection, means)
    before = {
        name: copy.copy(dict(part.parameters()))
        for name, part in sliced.slices[ffn.path][1].items()
    }
    renewed = with_other_neurons(selection, ffn.path, 2, 32)
    renewed = with_other_neurons(renewed, ffn.path, 1, 3)  # too few to matter
    other_means = {ffn.path: MeanCompensation(0.1 * mx.random.normal(ffn.shape))}
    sliced.update(renewed, other_means)
    kept = sliced.selection.indices[ffn.path]
    assert np.array_equal(kept[2], renewed.indices[ffn.path][2])
    assert np.array_equal(kept[[0, 1, 3]], selection.indices[ffn.path][[0, 1, 3]])
    for name, part in sliced.slices[ffn.path][1].items():
        for key, array in part.parameters().items():
            if isinstance(array, mx.array):
                changed = (array != before[name][key]).reshape(len(array), -1).any(axis=-1)
                assert changed.tolist() == [False, False, True, False]
    rows = (sliced.slices[ffn.path][1]["gate_proj"].weight != before["gate_proj"]["weight"])[2]
    assert rows.any(axis=-1).sum() == 32


def test_compensation_of_an_expert_is_weighted_like_the_expert():
    """The constants of an expert are its output for the mean hidden vector, before weighting."""
    model = routed_model()
    (ffn, *_), selection = find_ffns(model), random_selection(model)
    means = 0.1 * mx.random.normal(ffn.shape)
    sliced = SlicedModel(model, [ffn], "requantize")
    sliced.update(selection, {ffn.path: MeanCompensation(means)})
    down = ffn.contract[1]
    for expert, kept in enumerate(selection.indices[ffn.path]):
        dropped = mx.array(np.setdiff1d(np.arange(ffn.width), kept))
        constant = down.weight[expert][:, dropped] @ means[expert][dropped]
        bias = sliced.slices[ffn.path][1]["down_proj"].bias[expert]
        assert mx.allclose(bias, down.bias[expert] + constant, atol=1e-5)


def test_statistics_count_a_token_for_its_experts_alone():
    """Against sums over tokens and experts one by one."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    (ffn,) = find_ffns(model)
    seen = []

    def observe(path, hidden, *, routing=None):
        seen.append((hidden, routing))
        return statistics.update(path, hidden, mask, routing)

    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (2, 40)))
    mask = np.random.default_rng(1).integers(0, 2, (2, 40))
    statistics = NeuronStatistics({ffn.path: ffn.shape}, ("griffin", "activation", "mean"), 2)
    with_taps(model, observe)(tokens)
    ((hidden, routing),) = seen
    rows = [np.array(a) for a in (hidden, routing.experts, routing.tokens)]
    assert routing.count == 80
    assert np.array_equal(np.bincount(rows[2]), np.full(80, 2))  # two experts a token
    gates = model.model.layers[0].mlp.gate
    chosen = {}

    class Gate(nn.Module):
        def __call__(self, x):
            chosen["gates"] = gates(x)
            return chosen["gates"]

    model.model.layers[0].mlp.gate = Gate()
    model(tokens)
    expected = np.argsort(-np.array(chosen["gates"]).reshape(80, 4), axis=-1)[:, :2]
    for token in range(80):
        assert {*rows[1][rows[2] == token].tolist()} == {*expected[token].tolist()}
    sums = np.zeros((3, 2, 4, ffn.width))
    counts = np.zeros((2, 4))
    for h, expert, token in zip(*rows, strict=True):
        if mask.reshape(-1)[token]:
            share = np.abs(h) / np.linalg.norm(h)
            sums[:, token // 40, expert] += share**2, share, h
            counts[token // 40, expert] += 1
    assert np.array_equal(statistics.sequence_routed()[ffn.path], counts)
    assert np.array_equal(statistics.routed(ffn.path), counts.sum(0))
    mean = sums / np.maximum(counts, 1)[..., None]
    for name, values in zip(("griffin", "activation", "mean"), mean, strict=True):
        expected_scores = np.sqrt(values) if name == "griffin" else values
        scores = statistics.sequence_scores(name)[ffn.path]
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-6)
    restored = NeuronStatistics.restored(statistics.state(), mx.float32)
    assert restored.names == statistics.names
    assert restored.shapes == {ffn.path: (4, 64)}
    assert np.array_equal(restored.sequence_routed()[ffn.path], counts)
    state = statistics.state()
    state[f"{ffn.path}.routed"] = state[f"{ffn.path}.routed"][:, :3]
    with pytest.raises(ValueError, match="number of experts"):
        NeuronStatistics.restored(state, mx.float32)


@pytest.mark.parametrize(("tokens", "samples"), [(4, 4), (9, 3), (100, 4)])
def test_the_last_stack_shows_a_sample_of_a_long_prompt(tokens, samples):
    model, counts = tiny_model("qwen3_moe", num_hidden_layers=2), {}

    def observe(path, hidden, *, routing=None):
        assert hidden.shape == (2 * routing.count, 64)
        counts[path] = routing.count
        return hidden

    text = mx.array(np.random.default_rng(0).integers(0, 256, (1, tokens)))
    assert mx.array_equal(with_taps(model, observe, max_samples=4)(text), model(text))
    assert [*counts.values()] == [tokens, samples]


def test_bad_selections_of_a_stack_are_refused():
    ffn: FFN = find_ffns(routed_model())[0]
    for indices in (np.arange(8), np.zeros((4, 8), int), np.tile(np.arange(250, 258), (4, 1))):
        with pytest.raises(ValueError, match="neuron indices must be"):
            ffn.sliced(indices, "scatter")
