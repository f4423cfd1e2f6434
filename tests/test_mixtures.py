"""Generations, conversations, priors and reports of mixtures of experts."""

import weakref
from dataclasses import replace

from glass_mlx import (
    load,
    load_prompt_cache,
    make_prompt_cache,
    memory,
    save_prompt_cache,
    stream_generate,
)
from glass_mlx.calibration.building import CalibrationSettings, calibrate
from glass_mlx.calibration.impact import measure_impact
from glass_mlx.calibration.mixture import MeasuredRecipe, Mixture
from glass_mlx.calibration.moments import SequenceMoments
from glass_mlx.calibration.texts import Recipe
from glass_mlx.config import DEFAULT_REFRESH, GlassConfig
from glass_mlx.fidelity.prompts import Continuation
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.generation_report import summary
from glass_mlx.memory import slice_bytes, without_room
from glass_mlx.models import Routing, find_ffns, find_head, named_arrays, weight_bytes, with_taps
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.display import MIN_EXPERT_TOKENS, describe, draw
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.ranking import TYPICAL_TOKENS, expert_prior_weights, fuse, ranks
from glass_mlx.selection import densities, neurons_to_keep
from glass_mlx.server.usage import glass_usage
from glass_mlx.session import Session
from glass_mlx.slicing import mean_compensation
from glass_mlx.statistics import MEAN, MIN_GENERATED_TOKENS
from helpers import (
    all_neurons,
    local_statistics,
    made_prior,
    random_selection,
    save_tiny_folder,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

PROMPT = [1, 7, 3, 200, 9, 54, 21, 8, 8, 31]


@pytest.fixture
def model():
    return tiny_model("qwen3_moe")


def run(model, tokenizer, prompt=PROMPT, n=20, **options):
    options = {"density": 0.5, "warmup": 3, "refresh": 4, "prior": made_prior(model)} | options
    return [*stream_generate(model, tokenizer, prompt, n, **options)]


# --- Selection ------------------------------------------------------------------------------------


def test_the_weight_of_an_experts_prior_follows_the_tokens_it_has_seen():
    tokens = np.array([0, 1, TYPICAL_TOKENS, 10 * TYPICAL_TOKENS])
    weights = expert_prior_weights(0.45, tokens)
    assert weights[0] == 1
    assert weights[2] == pytest.approx(0.45)
    assert np.all(np.diff(weights) < 0)
    c = TYPICAL_TOKENS * 0.45 / 0.55
    assert weights == pytest.approx(c / (c + tokens))
    # An uncertain prior weighs less: the variances of its tokens and of the text add up.
    uncertain = expert_prior_weights(0.45, tokens, np.array([5.0, 5.0, 5.0, 0.0]))
    assert uncertain[0] == 1
    assert uncertain[1] == pytest.approx(1 / (1 + 1 * (1 / c + 1 / 5)))
    assert uncertain[3] == 0
    assert np.all(expert_prior_weights(1.0, tokens) == 1)
    assert expert_prior_weights(0.0, tokens).tolist() == [1, 0, 0, 0]


def test_the_rule_is_the_precision_weighted_mean_of_two_noisy_rankings():
    """The weight that minimizes the expected distance to what a text needs, by simulation."""
    rng, tau, sigma = np.random.default_rng(0), 0.5, 2.0
    n, prior_tokens, trials = 6, 40, 200_000
    truth = rng.normal(size=trials)  # of a text
    center = truth + tau * rng.normal(size=trials)  # of all texts
    prior = center + sigma / prior_tokens**0.5 * rng.normal(size=trials)
    local = truth + sigma / n**0.5 * rng.normal(size=trials)
    weights = np.linspace(0, 1, 101)
    errors = [np.square((1 - w) * local + w * prior - truth).mean() for w in weights]
    # c = σ² / τ² tokens of a text say as much as a certain prior.
    c = sigma**2 / tau**2
    at_typical = c / (c + TYPICAL_TOKENS)
    rule = expert_prior_weights(at_typical, np.array([n]), np.array([prior_tokens]))
    assert weights[np.argmin(errors)] == pytest.approx(rule[0], abs=0.02)


def test_experts_are_ranked_by_their_own_evidence(model):
    """Few of the text's tokens: the prompt's count, too. None at all: the prior alone."""
    statistics, prior = local_statistics(model, 12, 9), made_prior(model)
    session = Session(model)
    path = session.ffns[0].path
    text, prompt = statistics.text.routed(path), statistics.prompt.routed(path)
    assert text.sum() == 18
    few = text < MIN_GENERATED_TOKENS
    assert few.any()
    scores = statistics.scores("griffin")[path]
    tokens = statistics.routed(path)
    assert np.array_equal(tokens, np.where(few, text + prompt, text))
    parts = statistics.text, statistics.prompt
    sums = [np.array(part.sums[path]["griffin"])[0] for part in parts]
    total = np.where(few[:, None], sums[0] + sums[1], sums[0])
    assert np.allclose(scores, np.sqrt(total / tokens[:, None]), rtol=1e-5)
    selector = session.selector(GlassConfig(density=0.5), prior)
    weights = expert_prior_weights(0.45, tokens, prior.routed[path])[:, None]
    expected = fuse(ranks(scores), ranks(prior.scores["griffin"][path]), weights)
    assert np.allclose(selector.fuse(statistics)[path], expected)
    unseen = session.empty_statistics()
    assert np.array_equal(
        selector.fuse(unseen)[path], ranks(prior.scores["griffin"][path]).astype(float)
    )


def test_means_of_experts_are_shrunk_by_their_own_tokens(model):
    statistics = local_statistics(model, 12, 20)
    for path, means in mean_compensation(statistics).items():
        tokens = statistics.text.routed(path)[:, None]
        assert len(np.unique(tokens)) > 1
        expected = statistics.text.scores(MEAN)[path] * tokens / (tokens + 16)
        assert np.allclose(means.inputs, expected, atol=1e-6)
        assert means.output is None


def test_all_experts_of_a_layer_keep_the_same_number(model):
    selector = Session(model).selector(GlassConfig(density=0.5), made_prior(model))
    selection = selector.select(local_statistics(model, 12, 9))
    assert {indices.shape for indices in selection.indices.values()} == {(4, 32)}
    assert selection.density == 0.5
    first, second, *_ = next(iter(selection.indices.values()))
    assert not np.array_equal(first, second)


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("bits", [None, 4])
def test_released_weights_of_experts_are_freed_and_reloaded(
    tmp_path, tokenizer, architecture, bits
):
    if bits and architecture == "deepseek_v3":
        pytest.skip("its tiny model has layers that are too narrow to quantize")
    quantization = {"group_size": 32, "bits": bits} if bits else {}
    folder = save_tiny_folder(tmp_path / "tiny", architecture, **quantization)
    model, _ = load(str(folder))
    dense = model(mx.array([PROMPT]))
    expected = run(model, tokenizer)
    names = tuple(f"{f.path}.{name}." for f in find_ffns(model) for name in f.layers)
    references = [
        weakref.ref(array)
        for path, array in tree_flatten(model.parameters())
        if path.startswith(names)
    ]
    assert references
    responses = run(model, tokenizer, reload=lambda: load(str(folder), lazy=True)[0])
    assert [r.token for r in responses] == [r.token for r in expected]
    assert not any(array() is not None for array in references)
    assert mx.array_equal(model(mx.array([PROMPT])), dense)


def test_a_saved_conversation_keeps_the_statistics_of_experts(model, tokenizer, tmp_path):
    cache = make_prompt_cache(model)
    run(model, tokenizer, prompt_cache=cache)
    file = tmp_path / "talk.safetensors"
    save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file)
    path = find_ffns(model)[0].path
    assert np.array_equal(loaded.statistics.text.routed(path), cache.statistics.text.routed(path))
    assert cache.statistics.prompt.routed(path).sum() == 2 * len(PROMPT)
    again = [
        [r.token for r in run(model, tokenizer, [5, 6], prompt_cache=c)] for c in (cache, loaded)
    ]
    assert again[0] == again[1]


# --- Bytes, memory and schedule -------------------------------------------------------------------


def bytes_of(ffns):
    layers = [layer for ffn in ffns for layer in ffn.layers.values()]
    return sum(array.nbytes for layer in layers for _, array in named_arrays(layer))


@pytest.mark.parametrize(
    ("architecture", "share"), [("qwen3_moe", 1 / 2), ("llama4", 1 / 4), ("dbrx", 1 / 2)]
)
def test_bytes_per_token_count_the_experts_that_a_token_reads(architecture, share):
    model = tiny_model(architecture)
    session = Session(model)
    stacks = [ffn for ffn in session.ffns if ffn.experts]
    assert session.read_shares == {ffn.path: share for ffn in stacks}
    size = bytes_of(stacks)
    whole = weight_bytes(model, find_head(model))
    assert session.weight_bytes == whole - round((1 - share) * size)
    selection = random_selection(model)
    for ffn in session.ffns:
        if not ffn.experts:
            selection.indices[ffn.path] = all_neurons(ffn)
    sliced = session.slice(selection, "requantize")
    assert session.weight_bytes - session.bytes_of(sliced) == pytest.approx(share * size / 2)


def test_the_report_counts_bytes_per_token(model, tokenizer):
    report = run(model, tokenizer)[-1].glass
    session = Session(model)
    size = bytes_of(session.ffns)
    assert report.dense_bytes == session.weight_bytes
    # Half of the neurons of the half of the experts that a token reads, and the bias of the rest.
    saved = report.dense_bytes - report.sliced_bytes
    assert saved == pytest.approx(size / 4, rel=0.02)


def test_mixtures_are_renewed_less_often():
    """By the ratio of all neurons to those that a token reads."""
    assert Session(tiny_model("llama")).refresh == DEFAULT_REFRESH
    session = Session(tiny_model("qwen3_moe"))
    assert session.refresh == 2 * DEFAULT_REFRESH
    assert session.selector(GlassConfig(density=0.5), None).config.refresh == 2 * DEFAULT_REFRESH
    explicit = session.selector(GlassConfig(density=0.5, refresh=8), None)
    assert explicit.config.refresh == 8
    assert session.conditions(GlassConfig())["refresh"] == 2 * DEFAULT_REFRESH


def leave_room(monkeypatch, model, share, density=0.5):
    """Leave memory for a share of the bytes of all slices of a model."""
    size = sum(array.nbytes for _, array in named_arrays(model))
    slices = sum(slice_bytes(ffn, density, "requantize") for ffn in find_ffns(model))
    usable = (size + share * slices) / (1 - memory._RESERVE)
    monkeypatch.setattr(memory, "usable_memory", lambda: usable + 1)


def test_where_no_slice_fits_a_generation_is_refused_with_what_to_do(model, tokenizer, monkeypatch):
    leave_room(monkeypatch, model, 0.2)  # of 4 layers
    with pytest.raises(ValueError, match=r"--release-dense.*glass-mlx export"):
        run(model, tokenizer)
    responses = run(
        model, tokenizer, reload=lambda: tiny_model("qwen3_moe"), refresh=0, dense_every=0
    )
    assert responses[-1].glass.density_got == 0.5
    leave_room(monkeypatch, model, 1)
    assert not run(model, tokenizer)[-1].glass.unsliced


def test_as_many_layers_are_sliced_as_fit_into_memory(model, tokenizer, monkeypatch):
    """The others compute what the dense model does, and the report says so."""
    leave_room(monkeypatch, model, 0.6)
    ffns = find_ffns(model)
    last = run(model, tokenizer)[-1]
    report = last.glass
    assert report.unsliced == {ffn.path for ffn in ffns[2:]}
    kept = report.selection.indices
    assert [kept[ffn.path].shape for ffn in ffns] == [(4, 32)] * 2 + [(4, 64)] * 2
    assert report.density_got == 0.75
    assert report.selections > 1
    assert report.dense_tokens > 3
    saved = report.dense_bytes - report.sliced_bytes
    assert saved == pytest.approx(bytes_of(ffns[:2]) / 4, rel=0.03)
    text = summary(last)
    assert "experts of 2 of 4 layers are sliced: memory" in text
    assert glass_usage(report, last.generation_tokens)["unsliced"] == 2
    assert "--release-dense" in text
    assert "are sliced" not in summary(replace(last, glass=replace(report, unsliced=frozenset())))


def test_what_saves_the_most_per_held_byte_is_sliced_first():
    """A dense FFN is read whole, and experts in part; what keeps all its neurons needs no room."""
    model = tiny_model("deepseek_v3")
    ffns, session = find_ffns(model), Session(model)
    dense = [ffn for ffn in ffns if ffn.experts is None]
    stacks = [ffn for ffn in ffns if ffn.experts is not None]
    assert dense
    assert stacks
    shares = {ffn.path: 0.5 for ffn in ffns}
    room = sum(slice_bytes(ffn, 0.5, "requantize") for ffn in dense)

    def whole(extra):
        usable = (room + extra) / (1 - memory._RESERVE) + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "usable_memory", lambda: usable)
            return without_room(0, ffns, shares, "requantize", session.read_shares)

    assert whole(0) == {ffn.path for ffn in stacks}
    assert whole(slice_bytes(stacks[0], 0.5, "requantize")) == {f.path for f in stacks[1:]}
    shares[stacks[0].path] = 1.0
    assert whole(0) == {ffn.path for ffn in stacks[1:]}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "llama"])
def test_what_slices_cost_is_known_without_memory_for_them(tokenizer, architecture, monkeypatch):
    """Curves are the same on a small machine, by masks; without these, fewer layers cost less."""
    model = tiny_model(architecture)
    session, prior = Session(model), made_prior(model)
    selector = session.selector(GlassConfig(density=0.5, warmup=9, refresh=8), prior)
    reading = DenseReading(session, Continuation(PROMPT, [*range(40)]), [9])
    expected = score(reading, selector).kl
    assert expected[9:].mean() > 0
    for share in (0.6, 0):
        leave_room(monkeypatch, model, share)
        kl = score(reading, selector, masks=True).kl
        np.testing.assert_allclose(kl[:15], expected[:15], rtol=1e-2, atol=1e-6)
        # A renewal keeps slices with nearly the same neurons, which masks do not.
        assert kl.mean() == pytest.approx(expected.mean(), rel=0.02)
    with pytest.raises(ValueError, match="slices need"):
        score(reading, selector)
    leave_room(monkeypatch, model, 0.6)
    partly = score(reading, selector)
    assert not np.allclose(partly.kl, expected, rtol=0.02)
    assert partly.bytes.min() > score(reading, selector, masks=True).bytes.min() - 1e-9


def test_layers_kept_dense_are_weighed_by_what_a_token_reads():
    model = tiny_model("deepseek_v3")
    session = Session(model)
    first = session.ffns[0]
    assert first.experts is None
    prior = made_prior(model)
    prior = replace(prior, about=prior.about | {"whole": [first.path]})
    selector = session.selector(GlassConfig(density=0.75), prior)
    read = {f.path: np.prod(f.shape) * session.read_shares.get(f.path, 1) for f in session.ffns}
    share = read[first.path] / sum(read.values())
    asked = (0.75 - share) / (1 - share)
    counts = selector.counts(session.shapes)
    assert counts[first.path] == first.width
    for ffn in session.ffns[1:]:
        assert counts[ffn.path] == neurons_to_keep(ffn.width, asked, ffn.multiple)
    selection = selector.select(local_statistics(model, 12, 9))
    kept = sum(read[path] * counts[path] / width for path, width in session.widths.items())
    assert selection.read_density(session.read_shares) == pytest.approx(kept / sum(read.values()))
    by_all = densities({f.path: np.prod(f.shape) for f in session.ffns}, 0.75, [first.path])
    assert by_all[session.ffns[-1].path] != pytest.approx(asked, abs=0.01)


def test_the_estimate_of_held_bytes_is_what_slices_take():
    model = tiny_model("qwen3_moe", hidden_size=128, head_dim=32, moe_intermediate_size=256)
    nn.quantize(model, 32, 4)
    mx.eval(model.parameters())
    ffns = find_ffns(model)
    before = mx.get_active_memory()
    sliced = Session(model).sliced_model("neuron-major")
    sliced.update(random_selection(model))
    held = mx.get_active_memory() - before
    expected = sum(slice_bytes(ffn, 0.5, "neuron-major") for ffn in ffns)
    assert held == pytest.approx(expected, rel=0.05)
    gone = Session(model).sliced_model("neuron-major", unsliced={ffn.path for ffn in ffns})
    del sliced
    gone.update(random_selection(model))
    assert mx.get_active_memory() - before < 0.01 * expected


# --- Priors ---------------------------------------------------------------------------------------


def settings(**changes):
    return replace(
        CalibrationSettings((Recipe("bos"),), tokens=300, length=60, batch_size=3, curve_texts=0),
        **changes,
    )


def test_a_prior_measures_every_expert_on_its_own_tokens(model, tokenizer, tmp_path):
    statistics = ("activation", "griffin", "impact")
    prior = calibrate(model, tokenizer, settings(statistics=statistics))
    per_token = 2
    for path, counts in prior.routed.items():
        assert counts.sum() == per_token * prior.about["tokens"]
        assert (counts > 0).all()
        for name in statistics:
            scores = prior.scores[name][path]
            assert scores.shape == (4, 64)
            assert np.isfinite(scores).all()
            assert (scores.max(-1) > 0).all()
        assert not np.allclose(prior.scores["griffin"][path][0], prior.scores["griffin"][path][1])
    prior.save(tmp_path / "prior.safetensors")
    loaded = GlobalPrior.load(tmp_path / "prior.safetensors")
    assert loaded.digest == prior.digest
    assert all(np.array_equal(loaded.routed[path], v) for path, v in prior.routed.items())
    assert loaded.fitted(Session(model).shapes, Session(model).fingerprint) is loaded
    few = sum(int((counts < MIN_EXPERT_TOKENS).sum()) for counts in prior.routed.values())
    assert f"{few} with fewer than {MIN_EXPERT_TOKENS}" in describe(prior)
    path = next(iter(prior.routed))
    thin = replace(prior, routed=prior.routed | {path: np.array([3, 99, 0, 50], np.float32)})
    assert f"too few in {path} 2" in describe(thin)
    draw(prior, tmp_path / "prior.png")


@pytest.fixture
def skewed():
    """Return a model that seldom chooses two experts, because their logits are never large."""
    model = tiny_model("qwen3_moe")
    for layer in model.layers:
        weight = np.array(layer.mlp.gate.weight)
        weight[2], weight[3] = weight[2] * 0.2, weight[:2].mean(0)
        layer.mlp.gate.weight = mx.array(weight)
    return model


def test_measuring_goes_on_while_experts_get_enough_tokens(skewed, tokenizer):
    for amount in ({"tokens": 200}, {"sequences": 4}):
        measured = []
        for factor in (1.0, 4.0):
            prior = calibrate(skewed, tokenizer, settings(**amount, expert_factor=factor))
            measured.append((prior.about["tokens"], np.concatenate([*prior.routed.values()])))
        (few, before), (more, after) = measured
        assert 150 < few < 260 < more <= 4 * 260
        assert 0 < before.min() < MIN_EXPERT_TOKENS
        assert after.min() >= MIN_EXPERT_TOKENS


def measured_recipe(tokens, routed):
    moments = SequenceMoments({"f": (4, 3)}, ("griffin",), 5)
    moments.routed["f"][:] = np.array(routed) / 2
    moments.tokens = tokens
    return MeasuredRecipe(Recipe("bos"), {}, moments, None)


def test_texts_are_chosen_that_reach_experts_with_few_tokens():
    first = measured_recipe(100, [90, 10, 0, 0])
    second = measured_recipe(50, [40, 2, 8, 0])
    mixture = Mixture([first, second], ("griffin",))
    assert mixture.short_experts(8, 1000) == {}  # nothing brings tokens to the last one
    short = mixture.short_experts(20, 1000)
    assert short["f"].tolist() == [False, True, True, False]
    assert mixture.best_recipe(short) is second
    # The third would need 75 more tokens of the second recipe, and the second 80 of the first.
    assert mixture.short_experts(20, 80)["f"].tolist() == [False, True, True, False]
    assert mixture.short_experts(20, 78)["f"].tolist() == [False, False, True, False]
    assert mixture.short_experts(20, 70) == {}
    second.exhausted = True
    assert mixture.short_experts(20, 1000)["f"].tolist() == [False, True, False, False]
    assert mixture.best_recipe(short) is first


def test_an_interrupted_calibration_of_experts_resumes_to_the_same_prior(
    skewed, tokenizer, tmp_path, monkeypatch
):
    """Also while it measures more than asked for, for experts with few tokens."""
    few = settings(tokens=100, batch_size=1)
    expected = calibrate(skewed, tokenizer, few)
    assert expected.about["sequences"] > 4  # three have a hundred tokens
    checkpoint, calls = tmp_path / "partial", []
    save = "glass_mlx.calibration.building.save_checkpoint"
    from glass_mlx.calibration.resume import save_checkpoint

    def interrupted(*arguments):
        save_checkpoint(*arguments)
        calls.append(1)
        if len(calls) in (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(save, interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            calibrate(skewed, tokenizer, few, checkpoint=checkpoint)
    prior = calibrate(skewed, tokenizer, few, checkpoint=checkpoint)
    assert len(calls) > 4
    assert prior.digest == expected.digest


def test_sequences_count_for_an_expert_by_their_tokens_there():
    moments = SequenceMoments({"f": (2, 3)}, ("griffin",), 4)
    scores = np.array([[[1.0, 2, 3], [0, 0, 0]], [[4, 5, 6], [7, 8, 9]]])
    routed = {"f": np.array([[1.0, 0], [3, 2]])}
    moments.add({"griffin": {"f": scores}}, np.zeros(4), 6, routed)
    assert np.allclose(moments.mean("griffin", "f"), [[3.25, 4.25, 5.25], [7, 8, 9]])
    assert np.allclose(moments.variance("griffin", "f")[1], 0)
    assert np.allclose(moments.variance("griffin", "f")[0], 27 / 16)
    assert np.allclose(moments.mean("griffin", "f", 0)[0], [1, 2, 3])
    other = SequenceMoments({"f": (2, 3)}, ("griffin",), 4)
    other.restore(moments.state())
    assert np.array_equal(other.mean("griffin", "f"), moments.mean("griffin", "f"))


@pytest.mark.parametrize("change", ["shape", "experts", "missing", "negative"])
def test_priors_with_damaged_experts_are_refused(model, tmp_path, change):
    prior, file = made_prior(model), tmp_path / "prior.safetensors"
    path = next(iter(prior.routed))
    if change == "missing":
        prior.routed.pop(path)
    elif change == "shape":
        prior.scores["griffin"][path] = prior.scores["griffin"][path][:, :5].copy()
    elif change == "experts":
        prior.routed[path] = prior.routed[path][:2]
    else:
        prior.routed[path] = -prior.routed[path]
    prior.save(file)
    with pytest.raises(ValueError, match="malformed"):
        GlobalPrior.load(file)


def test_a_prior_of_other_experts_is_refused(model):
    prior, session = made_prior(model), Session(model)
    fewer = Session(tiny_model("qwen3_moe", num_experts=3))
    with pytest.raises(ValueError, match="3 x 64 neurons in the model and 4 x 64 in it"):
        prior.fitted(fewer.shapes, fewer.fingerprint)
    swapped = tiny_model("qwen3_moe")
    for layer in swapped.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            stack = layer.mlp.switch_mlp[name]
            stack.weight = stack.weight[mx.array([1, 0, 2, 3])]
    swapped_session = Session(swapped)
    assert prior.fitted(session.shapes, session.fingerprint) is prior
    with pytest.raises(ValueError, match="other order of neurons"):
        prior.fitted(swapped_session.shapes, swapped_session.fingerprint)


def test_the_impact_of_an_experts_neuron_is_over_its_own_tokens(model):
    """Against gradients of zeros that are added to the hidden vectors."""
    tokens, mask = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [0, 0, *[1] * 9, 0]
    hidden, routings = {}, {}

    def loss(addends):
        def observe(path, h, *, routing=None):
            hidden[path], routings[path] = mx.stop_gradient(h), routing
            return h + addends[path]

        logits = with_taps(model, observe)(mx.array(tokens)[None])[0, :-1]
        return nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="sum")

    zeros = {ffn.path: mx.zeros((2 * len(tokens), ffn.width)) for ffn in find_ffns(model)}
    gradients = mx.grad(loss)(zeros)
    loss(zeros)
    measured = measure_impact(model, tokens, mask)
    for path, gradient in gradients.items():
        rows = np.abs(np.array(hidden[path] * gradient))
        experts, numbers = (np.array(a) for a in (routings[path].experts, routings[path].tokens))
        counts = np.array(mask)[numbers]
        for expert in range(4):
            own = counts * (experts == expert)
            expected = own @ rows / max(own.sum(), 1)
            np.testing.assert_allclose(
                np.array(measured[path])[expert], expected, rtol=1e-3, atol=1e-7
            )


def test_impact_on_experts_in_a_list_is_refused():
    with pytest.raises(ValueError, match="experts in a list"):
        measure_impact(tiny_model("dbrx"), PROMPT, [1] * len(PROMPT))


def test_single_tokens_are_joined_like_those_of_a_batch(model):
    """Batches and single tokens in any mixture give the tokens the same numbers."""
    path = find_ffns(model)[0].path
    seen: list[Routing] = []

    def observe(at, hidden, *, routing=None):
        if at == path:
            seen.append(routing)
        return hidden

    tapped = with_taps(model, observe)
    for text in ([3], [1], [4], [1, 5], [9]):
        mx.eval(tapped(mx.array([text])))
    for parts in (seen[:3], seen, seen[3:4], seen[:1]):
        joined = Routing.joined(parts)
        numbers, start = [], 0
        for part in parts:
            numbers += (np.array(part.tokens) + start).tolist()
            start += part.count
        assert np.array(joined.tokens).tolist() == numbers
        assert joined.count == start
        assert np.array_equal(joined.experts, np.concatenate([p.experts for p in parts]))
