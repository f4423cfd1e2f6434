"""Conversations under templates like those of real models: the cache holds what the template says.

The templates are our own. Each has the structure of a family of models.
"""

import json

from glass_mlx import load_prompt_cache
from glass_mlx.generate.__main__ import main as generate
from glass_mlx.models.architectures import configuration, tiny_model
from helpers import prior_with_curves

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|turn|>", "<|end|>", "<|head|>", "<|/head|>", "[INST]", "[/INST]"]
SPECIAL += ["<think>", "</think>", "<|user|>", "<|bot|>"]

# As ChatML: every turn has the same frame, and a system turn is added if there is none.
CHATML = (
    "{% if messages[0].role != 'system' %}<|turn|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# As Llama 3: a BOS, headers, trimmed contents, and the date in the system turn.
LLAMA = (
    "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "<s><|head|>system<|/head|>\n\nToday: {{ date_string }}\n\n<|end|>"
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# As Gemma: the assistant has another name, roles must alternate, and there is no system role.
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
# As Mistral: answers follow directly, and EOS ends them. There is no generation prompt.
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# As DeepSeek: the answer begins with thinking, which is left out of earlier turns.
THINKING = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|bot|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# Marks the last question, so that earlier turns change with every new one.
LAST = (
    "{% for m in messages %}<|turn|>{{ 'last ' if loop.index0 == messages | length - 1 else '' }}"
    "{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama": LLAMA,
    "Gemma": GEMMA,
    "Mistral": MISTRAL,
    "thinking": THINKING,
    "last question": LAST,
}


def byte_tokenizer(template):
    """Return a tokenizer of bytes and special tokens."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return fast


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Save a model whose answers are letters, as text that survives decoding and encoding."""
    model = tiny_model("llama", vocab_size=272)
    letters = {byte_tokenizer(None).convert_tokens_to_ids(letter) for letter in "abcdefghij"}
    mask = mx.array([[float(n in letters)] for n in range(272)])
    model.lm_head.weight = model.lm_head.weight * mask + (1 - mask) * model.lm_head.weight * 1e-3
    folder = tmp_path_factory.mktemp("weights")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    prior_with_curves(model).save(folder / "glass_prior.safetensors")
    return folder


@pytest.fixture
def make_folder(weights, tmp_path):
    def make(template):
        folder = tmp_path / "tiny"
        folder.mkdir()
        for file in weights.iterdir():
            (folder / file.name).symlink_to(file)
        config = configuration("llama") | {"vocab_size": 272}
        (folder / "config.json").write_text(json.dumps(config))
        byte_tokenizer(template).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_cache_holds_what_the_template_makes_of_all_messages(
    run_command, make_folder, tmp_path, name
):
    folder, file = make_folder(TEMPLATES[name]), tmp_path / "talk.safetensors"
    tokenizer, model = TokenizerWrapper(byte_tokenizer(TEMPLATES[name])), None
    read = []
    for n, question in enumerate(("hi there", "tell me\nmore ", "why?")):
        source = ("--prompt-cache-file", file) if n else ("--model", folder)
        code, out, err = run_command(
            generate, *source, "-p", question, "-m", 7, "--density", 1, "--save-prompt-cache", file
        )
        assert code == 0, err
        read.append(int(out.split("Prompt: ")[1].split()[0]))
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        *messages, answer = json.loads(metadata["messages"])
        assert [m["role"] for m in messages] == ["user", "assistant"] * n + ["user"]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert cache.tokens[:-7] == tokens
        assert {layer.offset for layer in cache} == {len(cache.tokens)}
        model = model or mlx_lm.load(str(folder))[0]
        dense = mlx_lm.stream_generate(model, tokenizer, tokens, 7)
        assert cache.tokens[-7:] == [r.token for r in dense]
        assert answer["content"] == tokenizer.decode(cache.tokens[-7:])
        statistics = cache.statistics.prompt.tokens + cache.statistics.text.tokens
        assert statistics <= len(cache.tokens)  # no token that was taken back counts
    # Only what is new is read, unless the template rewrites earlier turns.
    whole = len(cache.tokens) - 7
    rewrites = name in ("thinking", "last question")
    assert read[-1] < (whole if rewrites else 45)


def test_what_the_template_takes_back_no_longer_counts(run_command, make_folder, tmp_path):
    """The first answer loses the opening of its thinking, so all after that is read again."""
    folder, file = make_folder(THINKING), tmp_path / "talk.safetensors"
    options = ("--density", 0.5, "--warmup", 12, "--save-prompt-cache", file)
    run_command(generate, "--model", folder, "-p", "hi", "-m", 20, *options)
    first = load_prompt_cache(file)
    before = first.tokens[: first.tokens.index(byte_tokenizer(None).vocab["<think>"])]
    # The sliced model reads the last of 12 warm-up tokens. Tokens 16 and 20 are dense.
    assert (first.statistics.prompt.tokens, first.statistics.text.tokens) == (len(before) + 2, 13)
    code, out, _ = run_command(
        generate, "--prompt-cache-file", file, "-p", "why?", "-m", 1, *options
    )
    assert code == 0
    cache = load_prompt_cache(file)
    assert cache.tokens[: len(before)] == before
    assert cache.tokens[len(before)] != first.tokens[len(before)]
    new = len(cache.tokens) - 1 - len(before)
    assert f"Prompt: {new} tokens" in out
    assert (cache.statistics.prompt.tokens, cache.statistics.text.tokens) == (new, 0)


def test_a_date_that_changes_between_turns_changes_the_cache(run_command, make_folder, tmp_path):
    folder, file = make_folder(LLAMA), tmp_path / "talk.safetensors"
    options = ("-m", 5, "--density", 1, "--save-prompt-cache", file)
    run_command(generate, "--model", folder, "-p", "hi", *options)
    date = ("--chat-template-config", json.dumps({"date_string": "27 Jul 2024"}))
    code, _, _ = run_command(generate, "--prompt-cache-file", file, "-p", "why?", *options, *date)
    assert code == 0
    cache, metadata = load_prompt_cache(file, return_metadata=True)
    tokens = byte_tokenizer(LLAMA).apply_chat_template(
        json.loads(metadata["messages"])[:-1],
        add_generation_prompt=True,
        date_string="27 Jul 2024",
        return_dict=False,
    )
    assert cache.tokens[:-5] == tokens


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (
            GEMMA,
            ("--system-prompt", "Be brief."),
            "does not accept these messages (no system role)",
        ),
        ("{{ messages[9].content }}", (), "does not accept these messages"),
        ("{% for m in messages %}", (), "does not accept these messages"),
    ],
)
def test_messages_that_a_template_rejects_end_in_one_sentence(
    run_command, make_folder, template, arguments, message
):
    code, out, err = run_command(generate, "--model", make_folder(template), "-p", "hi", *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("glass-mlx: error: ")
