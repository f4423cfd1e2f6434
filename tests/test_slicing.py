from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from glass_mlx.models import Rest, find_ffns
from glass_mlx.models.architectures import tiny_model
from glass_mlx.selection import Selection
from glass_mlx.slicing import Evidence, Slicer, Slicing, slice_model
from glass_mlx.statistics import MEAN
from invariants import random_selection
from test_prior import made_prior

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest


@pytest.fixture
def model():
    return tiny_model("llama", intermediate_size=1280)


def seen(model, prompt, generated, seed=0):
    """Evidence of random hidden vectors."""
    evidence, rng = Evidence.of(model), np.random.default_rng(seed)
    for part, tokens in ((evidence.prompt, prompt), (evidence.text, generated)):
        for ffn in find_ffns(model):
            if tokens:
                part.update(ffn.path, mx.array(rng.normal(size=(1, tokens, ffn.width))))
    return evidence


def test_renewals_are_spaced_out():
    assert list(islice(Slicing().renewals(), 12)) == [
        *(16, 32, 64, 96, 128),
        *(192, 256, 320, 384),
        *(512, 640, 768),
    ]
    assert list(islice(Slicing(warmup=40).renewals(), 3)) == [40, 64, 96]
    assert list(Slicing(refresh=0).renewals()) == [16]
    assert list(Slicing(density=1.0).renewals()) == [16]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": 0}, "warm-up must be at least 1"),
        ({"refresh": 1}, "at least 2 tokens, or 0"),
        ({"refresh": -3}, "at least 2 tokens, or 0"),
        ({"mix": 1.5}, "between 0 and 1"),
        ({"statistic": MEAN}, "statistic 'mean'"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Slicing(**wrong).check()


def test_the_text_takes_over_from_the_prompt_when_there_is_enough(model):
    few, enough = seen(model, 20, 7), seen(model, 20, 8)
    assert few.local is few.prompt
    assert enough.local is enough.text
    slicing, ffns = Slicing(prior=made_prior(model), density=0.5), find_ffns(model)
    alone = seen(model, 0, 8)
    for path, scores in enough.text.scores("griffin").items():
        alone.text.sums[path] = enough.text.sums[path]
        assert np.array_equal(scores, alone.text.scores("griffin")[path])
    ours, theirs = slicing.select(ffns, enough), slicing.select(ffns, alone)
    assert all(np.array_equal(kept, theirs.indices[path]) for path, kept in ours.indices.items())


def test_slices_are_made_in_any_thread(model):
    mx.eval(model.parameters())
    selection = random_selection(model)

    def logits():
        return np.array(slice_model(model, selection, "requantize")(mx.array([[1, 2, 3]])))

    here = logits()
    with ThreadPoolExecutor(1) as other:
        assert np.array_equal(other.submit(logits).result(), here)


def test_stand_ins_are_means_drawn_towards_zero(model):
    assert seen(model, 20, 7).stand_ins() == {}
    evidence = Evidence.of(model)
    path = find_ffns(model)[0].path
    hidden = np.random.default_rng(0).normal(2, 1, (1, 16, 1280)).astype(np.float32)
    for part in (hidden[:, :10], hidden[:, 10:]):
        evidence.text.update(path, mx.array(part))
    assert evidence.text.tokens == 16
    assert np.allclose(evidence.stand_ins()[path].inputs, hidden[0].mean(0) / 2, atol=1e-5)
    assert evidence.stand_ins()[path].output is None
    down = mx.random.normal((1280, 64))
    for part in (hidden[:, :10], hidden[:, 10:]):
        evidence.text.update_outputs(path, mx.array(part) @ down)
    rest = evidence.copy().stand_ins()[path]
    assert np.allclose(rest.output, rest.inputs @ down, atol=1e-3)


def test_one_token_takes_the_prior_and_no_prior_the_text(model):
    slicing = Slicing(prior=made_prior(model), mix=0.3)
    assert slicing.weight(seen(model, 1, 0)) == 1
    assert slicing.weight(seen(model, 2, 0)) == 0.3
    assert Slicing(mix=0.3).weight(seen(model, 2, 9)) == 0


def test_ffns_that_the_prior_says_so_of_are_kept_whole(model):
    ffns, prior = find_ffns(model), made_prior(model)
    first = ffns[0].path
    prior = replace(prior, about=prior.about | {"whole": [first]})
    slicing = Slicing(prior=prior, density=0.75)
    kept = slicing.select(ffns, seen(model, 9, 9))
    assert len(kept.indices[first]) == 1280
    assert kept.density == pytest.approx(0.75, abs=0.02)
    kept = replace(slicing, budgets=False).select(ffns, seen(model, 9, 9))
    assert len(kept.indices[first]) == 960


def moved(selection, path, count, seed=0):
    """A selection in which some neurons of one FFN are others."""
    generator, own = np.random.default_rng(seed), selection.indices[path]
    others = np.setdiff1d(np.arange(selection.widths[path]), own)
    stay = generator.permutation(own)[count:]
    kept = np.sort([*stay, *generator.permutation(others)[:count]]).astype(np.int32)
    return Selection(selection.indices | {path: kept}, selection.widths)


def test_slices_that_would_hardly_change_are_kept(model):
    slicer, first = Slicer(model, "requantize"), random_selection(model)
    one, kept = slicer(first)
    assert all(np.array_equal(kept.indices[path], first.indices[path]) for path in first.indices)
    paths = [*first.indices]
    before = [mx.array(dict(one.named_modules())[f"{p}.gate_proj"].weight) for p in paths]
    second = moved(moved(first, paths[0], 20), paths[1], 40)  # of 640: 97 % stay, and 94 %
    two, kept = slicer(second)
    assert np.array_equal(kept.indices[paths[0]], first.indices[paths[0]])
    assert np.array_equal(kept.indices[paths[1]], second.indices[paths[1]])
    after = [dict(two.named_modules())[f"{p}.gate_proj"].weight for p in paths]
    assert mx.array_equal(before[0], after[0])
    assert (before[1] != after[1]).any(axis=1).sum() == 40  # rows; the others are where they were


@pytest.mark.parametrize("architecture", ["llama", "glm4", "phi3small", "gpt2", "starcoder2"])
@pytest.mark.parametrize(
    ("bits", "policy"),
    [
        (None, "requantize"),
        *((4, policy) for policy in ("neuron-major", "requantize", "scatter")),
        (8, "neuron-major"),
    ],
)
def test_a_moved_slice_computes_what_a_new_one_does(architecture, bits, policy):
    model = tiny_model(architecture)
    if bits:
        nn.quantize(model, 32, bits)
    for ffn in find_ffns(model):
        for layer in (*ffn.expand.values(), ffn.contract[1]):
            if "bias" in layer:
                layer.bias = mx.random.normal(layer.bias.shape)
    slicer, selection = Slicer(model, policy), random_selection(model)
    slicer(selection)
    x = mx.random.normal((2, 64))
    for turn in range(3):
        for path in selection.indices:
            selection = moved(selection, path, 12 + 9 * turn, turn)
        rest = {path: Rest(mx.random.normal((m,))) for path, m in selection.widths.items()}
        again, kept = slicer(selection, rest)
        fresh, _ = Slicer(model, policy)(selection, rest)
        for path, indices in kept.indices.items():
            assert np.array_equal(indices, selection.indices[path])
            ours, theirs = (dict(m.named_modules())[path](x) for m in (again, fresh))
            assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_slice_of_another_size_is_made_anew(model):
    slicer = Slicer(model, "requantize")
    slicer(random_selection(model, share=0.5))
    wider = random_selection(model, share=0.75)
    model, kept = slicer(wider)
    assert kept.density == wider.density
    assert dict(model.named_modules())["model.layers.0.mlp.up_proj"].weight.shape == (960, 64)
