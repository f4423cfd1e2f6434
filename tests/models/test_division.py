"""Divided models, as far as one process can tell; see also test_distributed.py."""

import copy
from contextlib import suppress
from types import SimpleNamespace

from glass_mlx.models import Ranks, divide, find_ffns, fingerprint
from glass_mlx.models.architectures import names, tiny_model
from glass_mlx.models.division import Division, division_of, mark
from glass_mlx.models.down import MeanCompensation, add_mean_compensation, put_inputs, take_inputs
from glass_mlx.models.fingerprints import _signs, _signs_of
from glass_mlx.models.ranks import _sendable
from glass_mlx.models.summed import SummedLinear, is_summed, summed

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


def ranks(size, rank=0):
    """Return ranks that cannot talk to each other."""
    return Ranks(SimpleNamespace(rank=lambda: rank, size=lambda: size))


def division(rank, size=2):
    shapes = {"a": (8,), "b": (3, 8), "c": (8,)}
    here, split = frozenset("abc"), frozenset("ab")
    return Division(ranks(size, rank), False, shapes, here, split, 1)


def test_each_rank_has_its_part_of_every_array():
    arrays = {"a": np.arange(8), "b": np.arange(24).reshape(3, 8), "c": np.arange(8)}
    parts = [division(rank).parts(arrays) for rank in range(2)]
    for path in "ab":
        both = np.concatenate([part[path] for part in parts], axis=-1)
        np.testing.assert_array_equal(both, arrays[path])
    np.testing.assert_array_equal(parts[1]["c"], arrays["c"])  # which every rank holds
    assert division(0).part("b", arrays["b"]).shape == (3, 4)


def test_arrays_of_layers_that_are_elsewhere_are_left_out():
    here = Division(ranks(2), True, {"a": (8,), "b": (8,)}, frozenset("a"), frozenset(), 2)
    arrays = {"a": np.arange(8), "b": np.arange(8)}
    assert here.parts(arrays).keys() == {"a"}


def test_an_error_that_cannot_be_pickled_keeps_its_message():
    class LocalError(Exception):
        def __init__(self, code, text):
            super().__init__(text)

    error = _sendable(LocalError(1, "the hub does not answer"))
    assert type(error) is ValueError
    assert str(error) == "the hub does not answer"
    known = FileNotFoundError("there is no prior")
    assert _sendable(known) is known


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_summed_layer_computes_what_mlx_layer_computes(bits, bias):
    mx.random.seed(0)
    layer = nn.Linear(64, 32, bias=bias)
    if bits:
        layer = nn.QuantizedLinear.from_linear(layer, 32, bits)
    kind = nn.QuantizedShardedToAllLinear if bits else nn.ShardedToAllLinear
    make = kind.from_quantized_linear if bits else kind.from_linear
    sharded = make(layer, group=mx.distributed.init())
    assert is_summed(sharded)
    x = mx.random.normal((3, 64))
    assert mx.array_equal(summed(sharded)(x), sharded(x))


def test_constants_of_dropped_neurons_are_summed_over_ranks():
    """Their place is before the sum, so that each rank adds those of its own neurons."""
    mx.random.seed(0)
    layer = SummedLinear(nn.Linear(64, 8, bias=False), mx.distributed.init(), mx.ones(8))
    kept, means = np.arange(0, 64, 2), mx.random.normal((64,))
    part = take_inputs(layer, kept)
    add_mean_compensation(layer, part, kept, MeanCompensation(means))
    assert mx.array_equal(part.bias, mx.ones(8))
    assert mx.allclose(part(means[mx.array(kept)]), layer(means), atol=1e-5)
    moved = np.array([1, *kept[1:]])
    put_inputs(layer, part, moved, np.array([0]))
    assert "bias" not in part.linear
    x = mx.random.normal((64,))
    expected = layer.linear.weight[:, mx.array(moved)] @ x[mx.array(moved)] + 1
    assert mx.allclose(part(x[mx.array(moved)]), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["single", "halves", "interleaved"])
def test_the_fingerprint_of_all_ranks_is_that_of_one(layout):
    rows = 8 if layout == "single" else 16
    columns = np.random.default_rng(0).normal(size=(rows, 4))
    whole = _signs(rows) @ columns
    total = np.zeros_like(whole)
    for rank in range(2):
        neurons = np.arange(rank * 4, rank * 4 + 4)
        if layout == "halves":
            held = np.concatenate([neurons, neurons + 8])
        elif layout == "interleaved":
            held = np.arange(rank * 8, rank * 8 + 8)
        else:
            held = neurons
        layer = nn.Linear(4, rows // 2)
        ffn = SimpleNamespace(path="a", expand={"up": layer}, experts=None, layout=layout)
        total += _signs_of(ffn, division(rank)) @ columns[held]
    np.testing.assert_allclose(total, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "changes", "size", "is_pipeline", "reason"),
    [
        ("llama", {}, 3, False, "the 128 neurons of model.layers.0.mlp cannot be divided over 3"),
        ("llama", {"num_key_value_heads": 1}, 2, False, r"the 1 attention heads \(n_kv_heads\)"),
        ("llama", {}, 2, True, "cannot run models of type llama as a pipeline"),
        ("gpt2", {}, 2, False, "cannot run models of type gpt2 tensor-parallel"),
        ("qwen2", {}, 5, True, "the model's 4 layers are fewer than the 5 machines"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    architecture, changes, size, is_pipeline, reason
):
    model = tiny_model(architecture, **changes)
    with pytest.raises(ValueError, match=reason):
        divide(model, ranks(size), is_pipeline)


def test_quantization_groups_must_be_divided_evenly():
    model = tiny_model("llama")
    nn.quantize(model, group_size=64, bits=4)
    with pytest.raises(ValueError, match="in quantization groups of 64 cannot be divided over 4"):
        divide(model, ranks(4), False)


def test_ffns_are_those_of_the_whole_model():
    model = tiny_model("llama")
    paths = [ffn.path for ffn in find_ffns(model)]
    shapes = dict.fromkeys(paths[1:], (128,))
    mark(model, Division(Ranks(), False, shapes, frozenset(shapes), frozenset(), 4))
    assert [ffn.path for ffn in find_ffns(model)] == paths[1:]
    assert fingerprint(model).samples.keys() == shapes.keys()


def divisible():
    """Yield the architectures that mlx-lm can divide, and whether into layers."""
    for name in names():
        with suppress(Exception):  # without a tiny model, or without FFNs
            model = tiny_model(name)
            find_ffns(model)
            ways = (hasattr(model, "shard"), hasattr(getattr(model, "model", None), "pipeline"))
            yield from ((name, is_pipeline) for is_pipeline in (False, True) if ways[is_pipeline])


@pytest.mark.slow
def test_every_ffn_of_every_architecture_is_divided():
    """mlx-lm divides the FFNs that are sliced, in the way that `Division` says."""
    found = [*divisible()]
    assert {("llama", False), ("deepseek_v3", False), ("qwen2", True)} <= {*found}
    for name, is_pipeline in found:
        try:
            model = tiny_model(name, num_key_value_heads=4)
        except ValueError:
            model = tiny_model(name)
        paths = {ffn.path for ffn in find_ffns(model)}
        halves = []
        for rank in range(2):
            part = copy.deepcopy(model)
            divide(part, ranks(2, rank), is_pipeline)
            halves.append(division_of(part))
        here = [half.here for half in halves]
        if is_pipeline:
            assert here[0] | here[1] == paths, name
            assert not here[0] & here[1], name
        else:
            assert all(half.split == half.here == paths for half in halves), name
