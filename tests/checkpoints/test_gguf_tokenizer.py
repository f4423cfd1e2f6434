"""Tokenizers from GGUF metadata, compared with SentencePiece and a reference BPE."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from glass_mlx.checkpoints.gguf import Metadata
from glass_mlx.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer

import gguf
import pytest
import regex
import sentencepiece
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

PARAGRAPH = (
    "In 1969, Neil's crew flew 384,400 km — \"that's one small step\".\n\n"
    "  Indented code:\n\tdef f(x):\n\t\treturn x**2  # naïve café, 日本語, 🙂!\r\n"
    "They'll say we've  had   it 3.14159 times; I'D agree…   "
)


def byte_pairs(
    text: str, split_words: Callable[[str], list[str]], ranks: dict[tuple[str, str], int]
) -> list[str]:
    """Tokenize by the definition of byte-level BPE: merge the pair of lowest rank, repeatedly."""
    alphabet = byte_alphabet()
    pieces = []
    for word in split_words(text):
        symbols = [alphabet[byte] for byte in word.encode()]
        while pairs := [(ranks[p], i) for i, p in enumerate(pairwise(symbols)) if p in ranks]:
            i = min(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        pieces += symbols
    return pieces


def byte_alphabet() -> dict[int, str]:
    """Map bytes to GPT-2's characters: a printable byte maps to itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def smollm_words(text: str) -> list[str]:
    """Split text by SmolLM's rule: single digits, and GPT-2's pattern between them."""
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    parts = regex.split(r"(\p{N})", text)
    return [word for part in parts for word in regex.findall(gpt2, part)]


@pytest.mark.slow
def test_the_built_in_model_tokenizes_by_the_rules_in_its_file(default_gguf, default_model):
    fields = gguf.GGUFReader(default_gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    _, tokenizer = default_model
    ids = tokenizer.encode(PARAGRAPH)
    assert [tokens[i] for i in ids] == byte_pairs(PARAGRAPH, smollm_words, ranks)
    assert tokenizer.decode(ids) == PARAGRAPH


@pytest.mark.slow
def test_the_built_in_model_has_its_chat_template_and_special_tokens(default_model):
    _, tokenizer = default_model
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == 1
    assert ids.count(2) == 2
    assert {0, 2} == tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "I'll add 1234!", ["I", "'ll", "Ġadd", "Ġ1234", "!"]),
        ("smollm", "add 12 34", ["add", "Ġ", "1", "2", "Ġ", "3", "4"]),
        ("llama-bpe", "I'LL add 12345!\n\n", ["I", "'LL", "Ġadd", "Ġ", "123", "45", "!ĊĊ"]),
        ("qwen2", "I'LL add 123", ["I", "'LL", "Ġadd", "Ġ", "1", "2", "3"]),
        ("tekken", "HTTPServer it's 12", ["HTTPServer", "Ġit", "'s", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(name, text, words):
    pieces = [(text, (0, len(text)))]
    for step in PRE_TOKENIZERS[name]:
        pieces = [piece for part, _ in pieces for piece in step.pre_tokenize_str(part)]
    assert [piece for piece, _ in pieces] == words


def metadata_of(model: sentencepiece.SentencePieceProcessor, prefix: bool) -> dict[str, object]:
    """Return the metadata that llama.cpp writes for a SentencePiece model."""
    ids = range(model.vocab_size())

    def token_type(i: int) -> int:
        if model.is_unknown(i):
            return 2
        return 3 if model.is_control(i) else 6 if model.is_byte(i) else 1

    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [token_type(i) for i in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_tokenize_as_sentencepiece_does(prefix, tmp_path):
    corpus = [*(Path(__file__).parents[2] / "LICENSE").read_text().splitlines(), PARAGRAPH]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3),
        model_writer=trained,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    metadata = metadata_of(reference, prefix)
    ids = write_tokenizer(lambda key, default=None: metadata.get(key, default), tmp_path)
    assert ids == {"bos_token_id": 1, "eos_token_id": [2]}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Permission is hereby granted, free of charge", "naïve  日本語 🙂 x", "a\tb c"):
        encoded = tokenizer.encode(text)
        assert encoded == [1, *reference.encode(text)]
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    wrapper = load_tokenizer(tmp_path, eos_token_ids=ids["eos_token_id"])
    detokenizer = wrapper.detokenizer
    for token in tokenizer.encode("granted, free", add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "granted, free"


def test_user_defined_and_control_tokens_are_single_tokens(tmp_path):
    tokens = [*sorted(ByteLevel.alphabet()), "<|end|>", "<tool>", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }
    ids = write_tokenizer(lambda key, default=None: metadata.get(key, default), tmp_path)
    assert ids["eos_token_id"] == [256, 258]  # the name of 258 marks the end of a turn
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    letter = tokens.index("a")
    assert tokenizer.encode("a<tool>a<|end|>") == [256, letter, 257, letter, 256]
    assert tokenizer.decode([letter, 257, 256], skip_special_tokens=True) == "a<tool>"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "t5"}, "'t5' is not known"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "llama"}, "no scores"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2"}, "None is not known"),
    ],
)
def test_unknown_tokenizers_are_refused(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_tokenizer(lambda key, default=None: metadata.get(key, default), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_saved_tokenizer_is_plain_json(default_gguf, tmp_path):
    write_tokenizer(Metadata(gguf.GGUFReader(default_gguf)).get, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in config["chat_template"]
