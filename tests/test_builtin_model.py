"""The built-in model: conversion, slicing and the packaged prior."""

from glass_mlx import GlassConfig, resolve_prior, stream_generate
from glass_mlx.budget import Budget
from glass_mlx.calibration.first_use import make_selector
from glass_mlx.fidelity.prompts import WritingSettings, continue_all
from glass_mlx.fidelity.scoring import DenseReading, score
from glass_mlx.kept_tokens import KeptTokens
from glass_mlx.models import DOWN_POLICIES, find_ffns
from glass_mlx.models.linear import dense_weight
from glass_mlx.selection import jaccard, select
from glass_mlx.session import Session
from helpers import SometimesRight, check_invariants, statistics_of

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.sample_utils import make_sampler

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PROMPT = "Why is the sky blue?"

pytestmark = pytest.mark.slow


def effective_weight(module: nn.Module) -> np.ndarray:
    """Return the matrix or vector that a module multiplies by."""
    if isinstance(module, nn.QuantizedEmbedding):
        parts = (module.weight, module.scales, module.biases, module.group_size, module.bits)
        return np.array(mx.dequantize(*parts))
    return np.array(module.weight if isinstance(module, nn.RMSNorm) else dense_weight(module))


def test_weights_equal_the_tensors_in_the_gguf_file(default_gguf, quantized_model):
    modules = dict(quantized_model[0].named_modules())
    tensors = gguf.GGUFReader(default_gguf).tensors
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, inner = name.split(".")
            path = f"model.layers.{layer}.{NAMES[inner]}"
        else:
            path = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[name]
        converted = effective_weight(modules[path])
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if heads := {"attn_q": 9, "attn_k": 3}.get(name.split(".")[-1]):
            # llama.cpp stores the two halves of a head's rotary dimensions interleaved
            converted = converted.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_allclose(converted, expected, rtol=1e-6, atol=1e-6, err_msg=path)
    assert (
        len(tensors)
        == 272
        == len(
            [p for p, _ in tree_flatten(quantized_model[0].parameters()) if p.endswith(".weight")]
        )
    )


def test_quantized_weights_are_kept(quantized_model):
    layers = [m for _, m in quantized_model[0].named_modules() if type(m) is nn.QuantizedLinear]
    assert len(layers) == 210
    assert {(m.bits, m.group_size) for m in layers} == {(4, 32)}
    assert quantized_model[0].model.embed_tokens.bits == 8


def test_the_model_knows_the_capital_of_france(default_model):
    model, tokenizer = default_model
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


def test_invariants(default_model):
    model, tokenizer = default_model
    tokens = mx.array(tokenizer.encode(PROMPT))[None]
    check_invariants(model, lambda m: m(tokens))


def test_invariants_of_the_quantized_model(quantized_model):
    model, tokenizer = quantized_model
    tokens = mx.array(tokenizer.encode(PROMPT))[None]
    check_invariants(model, lambda m: m(tokens))


def test_all_neurons_give_the_dense_tokens_and_logits_bit_for_bit(default_model):
    model, tokenizer = default_model
    dense = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=10)
    ours = stream_generate(model, tokenizer, PROMPT, max_tokens=10, density=1.0, warmup=2)
    for a, b in zip(ours, dense, strict=True):
        assert (a.token, a.text) == (b.token, b.text)
        assert mx.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("fixture", ["default_model", "quantized_model"])
def test_the_packaged_prior_fits_the_model_in_every_precision(fixture, request):
    model, _ = request.getfixturevalue(fixture)
    prior = resolve_prior(model)
    assert prior.about["tokens"] >= 16000
    assert prior.source.endswith("priors/SmolLM2-135M-Instruct.safetensors")
    assert prior.scores.keys() == prior.spread.keys() == {"activation", "griffin", "impact"}
    assert {len(s) for s in prior.scores["activation"].values()} == {1536}
    assert len(prior.scores["activation"]) == 30


def test_the_prior_agrees_with_text_better_than_chance(default_model):
    """The top halves by prior and by text overlap far more than the 1/3 expected by chance."""
    model, tokenizer = default_model
    text = tokenizer.encode("The old harbour was quiet. A single lamp burned in the window, " * 3)
    multiples = {ffn.path: ffn.multiple for ffn in find_ffns(model)}
    local = statistics_of(model, [mx.array(text)[None]], cached=True)["activation"]
    a = select(local, 0.5, multiples)
    b = select(resolve_prior(model).scores["activation"], 0.5, multiples)
    assert np.mean(list(jaccard(a, b).values())) > 0.4


def test_the_answer_at_high_density_stays_close_to_the_dense_answer(default_model):
    model, tokenizer = default_model
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = list(
        stream_generate(model, tokenizer, prompt, max_tokens=12, density=0.9, warmup=1)
    )
    assert "Paris" in "".join(r.text for r in responses)
    assert responses[-1].glass.density_got == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("fixture", ["default_model", "quantized_model"])
def test_the_packaged_prior_has_curves_for_the_default_settings(fixture, request):
    session = Session(request.getfixturevalue(fixture)[0])
    policies = DOWN_POLICIES if fixture == "quantized_model" else [GlassConfig().down_policy]
    for policy in policies:
        if policy == "scatter":
            continue
        config = GlassConfig(max_kl=0.1, down_policy=policy)
        curve = session.find_prior().curve(session.conditions(config))
        assert curve is not None
        assert 0.8 < Budget.spend(0.1, curve).density < 1


@pytest.mark.slow
def test_slices_stay_within_the_bound_whatever_the_text(default_model):
    """The bound holds on average; a short text may cost twice or three times as much."""
    prompts = [
        "请用中文介绍一下北京的历史，并列出三个著名景点。",
        "Расскажи коротко историю Москвы на русском языке.",
        "Write a C++ template that sorts a std::vector with a comparator:\n```cpp\n",
        "🎉🐙🦊 Repeat this line with more animals: 🎉🐙🦊🐢🦉🐝",
        "Count on from 31415926535897932384, with one number a line.",
        "Why is the sky blue?",
    ]
    model, tokenizer = default_model
    kl = []
    for prompt in prompts:
        messages = [[{"role": "user", "content": prompt}]]
        (text,) = continue_all(model, tokenizer, messages, WritingSettings(64, 0.7, 0))
        reading = DenseReading(model, text, [GlassConfig.warmup])
        session = reading.session
        selector = make_selector(session, tokenizer, session.find_prior(), GlassConfig(max_kl=0.1))
        scores = score(reading, selector)
        assert scores.vocabulary[GlassConfig.warmup] < 1
        kl.append(scores.kl.mean())
    assert 0 < np.mean(kl) < 0.1
    assert max(kl) < 0.3


@pytest.mark.parametrize("has_draft", [False, True])
def test_drafts_leave_the_text_of_the_dense_model_as_it_is(default_model, has_draft):
    """At density 1 the text is mlx-lm's, with a draft model that is right at times and without."""
    model, tokenizer = default_model
    draft = {"draft_model": SometimesRight(model), "num_draft_tokens": 3}
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    theirs = mlx_lm.stream_generate(model, tokenizer, tokens, 40, **draft if has_draft else {})
    ours = [*stream_generate(model, tokenizer, tokens, 40, prior=False, density=1.0, **draft)]
    assert [r.token for r in ours] == [r.token for r in theirs]
    assert 8 < sum(r.from_draft for r in ours) < 32


@pytest.mark.parametrize(
    ("text", "word", "place"),
    [
        ("She works as a teacher.", "teacher", '{"job": "teacher"}'),
        ("She works as a teacher.", "Teacher", "Teacher"),
        ('{"city": "Athens"}', " Athens", "She lives in Athens"),
        ('{"city": "Athens"}', " athens", "She lives in athens"),
        ("Frau Jürgensen ist da.", "Jürgensen", '["Jürgensen"]'),
        ("Это сказал учитель.", "учитель", '["учитель"]'),
    ],
)
def test_words_of_a_text_can_be_written_in_other_places(default_model, text, word, place):
    _, tokenizer = default_model
    start, end = place.split(word)
    whole, before, after = (tokenizer.encode(part) for part in (place, start, end))
    spelling = whole[len(before) : len(whole) - len(after)]
    assert tokenizer.decode(spelling) == word
    kept = KeptTokens(tokenizer)(tokenizer.encode(text))
    assert kept >= {*spelling}


@pytest.mark.slow
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_by_default_the_text_is_that_of_mlx_lm(default_model, temp):
    model, tokenizer = default_model
    for prompt in ("Why is the sky blue?", "请用中文介绍一下北京的历史。"):
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        texts = []
        for generate in (mlx_lm.stream_generate, stream_generate):
            mx.random.seed(1)
            sampler = make_sampler(temp)
            responses = [*generate(model, tokenizer, tokens, max_tokens=60, sampler=sampler)]
            texts.append([response.token for response in responses])
        assert texts[0] == texts[1]
        assert responses[-1].glass.drafts > 0
