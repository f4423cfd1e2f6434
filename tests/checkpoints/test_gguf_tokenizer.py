"""Tokenizers from GGUF metadata, compared with SentencePiece and a reference BPE."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from glass_mlx.checkpoints.gguf_file import read_gguf
from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata
from glass_mlx.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from glass_mlx.checkpoints.gguf_tokenizer import write_tokenizer

import gguf
import numpy as np
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
    # 4 is <reponame>, which ends a generation in llama.cpp, too.
    assert {0, 2, 4} == tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "I'll add 1234!", ["I", "'ll", "Ġadd", "Ġ1234", "!"]),
        ("smollm", "add 12 34", ["add", "Ġ", "1", "2", "Ġ", "3", "4"]),
        ("llama-bpe", "I'LL add 12345!\n\n", ["I", "'LL", "Ġadd", "Ġ", "123", "45", "!ĊĊ"]),
        ("qwen2", "I'LL add 123", ["I", "'LL", "Ġadd", "Ġ", "1", "2", "3"]),
        ("tekken", "HTTPServer it's 12", ["HTTPServer", "Ġit", "'s", "Ġ", "1", "2"]),
        ("default", "it's $12345. ok", ["it", "'", "s", "Ġ", "$", "123", "45", ".", "Ġok"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(name, text, words):
    pieces = [(text, (0, len(text)))]
    for step in PRE_TOKENIZERS[name].steps:
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
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": np.array([token_type(i) for i in ids]),
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
    ids = write_tokenizer(Metadata(metadata), tmp_path)
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


ALPHABET = sorted(ByteLevel.alphabet())


def byte_level(*special: str, kind: int = 3, **changes: object) -> Metadata:
    """Return the metadata of a byte-level vocabulary of 256 bytes and special tokens.

    Args:
        special: texts of tokens, from id 256.
        kind: their type.
        changes: keys after "tokenizer.ggml."; None leaves a key out.
    """
    keys = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*ALPHABET, *special],
        "token_type": np.array([1] * 256 + [kind] * len(special)),
        "merges": [],
    } | changes
    values = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}
    return Metadata({"general.architecture": "llama"} | values)


def load_written(metadata: Metadata, folder: Path, rows: int | None = None):
    """Write a tokenizer and load it as mlx-lm does."""
    ids = write_tokenizer(metadata, folder, rows)
    return load_tokenizer(folder, eos_token_ids=ids["eos_token_id"])


def stream(tokenizer, tokens: list[int]) -> str:
    """Return the text of tokens that are generated one after another."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return detokenizer.text


def test_user_defined_and_control_tokens_are_single_tokens(tmp_path):
    types = np.array([1] * 256 + [3, 4, 3])
    metadata = byte_level(
        "<|end|>",
        "<tool>",
        "<|im_end|>",
        token_type=types,
        bos_token_id=256,
        eos_token_id=256,
        add_bos_token=True,
    )
    ids = write_tokenizer(metadata, tmp_path)
    assert ids["eos_token_id"] == [256, 258]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    letter = ALPHABET.index("a")
    assert tokenizer.encode("a<tool>a<|end|>") == [256, letter, 257, letter, 256]
    assert tokenizer.decode([letter, 257, 256], skip_special_tokens=True) == "a<tool>"


@pytest.mark.parametrize(
    ("pre", "adds_bos"),
    [
        ("llama-bpe", True),
        ("llama3", True),
        ("llama-v3", True),
        ("falcon3", True),
        ("pixtral", True),
        ("tekken", True),
        ("qwen2", False),
        ("smollm", False),
        ("gpt-2", False),
        ("deepseek-r1-qwen", False),
        ("smaug-bpe", False),
        ("default", False),
    ],
)
def test_whether_text_starts_with_bos_depends_on_the_pre_tokenizer(pre, adds_bos, tmp_path):
    letter = ALPHABET.index("a")
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    for stated in (None, False, True):
        metadata = byte_level("<s>", "</s>", pre=pre, add_bos_token=stated, **ends)
        tokenizer = load_written(metadata, tmp_path)
        expected = adds_bos if stated is None else stated
        assert tokenizer.encode("a") == [256] * expected + [letter]
    metadata = byte_level("<s>", "</s>", pre=pre, add_eos_token=True, **ends)
    assert load_written(metadata, tmp_path).encode("a") == [256] * adds_bos + [letter, 257]
    # The default id of BOS is 11.
    metadata = byte_level("<s>", "</s>", pre=pre, eos_token_id=257)
    assert load_written(metadata, tmp_path).encode("a") == [11] * adds_bos + [letter]


def test_a_token_that_is_to_be_added_must_exist(tmp_path):
    few = {"tokens": ["a", "b"], "token_type": np.array([1, 1])}
    with pytest.raises(GGUFError, match="it adds the token bos to text, but has no such token"):
        write_tokenizer(byte_level(add_bos_token=True, **few), tmp_path)
    with pytest.raises(GGUFError, match="add_bos_token is 1, not a boolean"):
        write_tokenizer(byte_level(add_bos_token=1), tmp_path)
    assert not list(tmp_path.iterdir())


END_TEXTS = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
]


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("text", END_TEXTS)
def test_tokens_that_end_a_generation_by_their_text(text, kind, tmp_path):
    metadata = byte_level(text, "<stop>", kind=kind, eos_token_id=257)
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.eos_token_ids == {256, 257}
    letter = ALPHABET.index("a")
    assert tokenizer.encode(f"a{text}a") == [letter, 256, letter]
    assert tokenizer.decode([letter, 256], skip_special_tokens=True) == "a"


def test_tokens_that_end_a_generation_by_their_key(tmp_path):
    names = ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"]
    keys = {f"{name}_token_id": 100 + i for i, name in enumerate(names)}
    # Other keys do not end anything, and a key takes the place of the text.
    keys |= {"bos_token_id": 110, "padding_token_id": 111, "fim_pre_token_id": 112}
    tokenizer = load_written(byte_level("<|fim_pad|>", "<|eom_id|>", **keys), tmp_path)
    assert tokenizer.eos_token_ids == {*range(100, 106), 257}


@pytest.mark.parametrize(
    ("texts", "end_ids"),
    [
        (("<|end|>", "<|return|>", "<|call|>"), {257, 258}),
        (("<|end|>", "<|flush|>", "<|calls|>"), {257, 258}),
        (("<|end|>", "<|return|>"), {256, 257}),
        (("</s>", "<|tool_response>"), {257}),
    ],
)
def test_texts_that_do_not_end_a_generation_beside_others(texts, end_ids, tmp_path):
    metadata = byte_level(*texts, eos_token_id=257)
    assert load_written(metadata, tmp_path).eos_token_ids == end_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos", 32000), ("eos", 258), ("bos", 32000), ("padding", 2**32 - 1), ("unknown", -1)],
)
def test_special_ids_out_of_range_are_ignored_with_a_warning(name, value, tmp_path, capsys):
    ids = {"bos_token_id": 256, "eos_token_id": 257, f"{name}_token_id": value}
    tokenizer = load_written(byte_level("<s>", "<stop>", **ids), tmp_path)
    warnings = capsys.readouterr().err.splitlines()
    instead = "; using token 11" if name in ("bos", "eos") else ""
    assert warnings == [
        f"warning: tokenizer.ggml.{name}_token_id is {value}, "
        f"but there are only 258 tokens{instead}"
    ]
    assert tokenizer.eos_token_ids == ({11} if name == "eos" else {257})
    assert tokenizer.bos_token_id == (None if name == "bos" else 256)


def test_missing_special_ids_have_the_defaults_of_llama_cpp(tmp_path):
    tokenizer = load_written(byte_level("<a>"), tmp_path)
    assert tokenizer.eos_token_ids == {11}
    # Token 11 is a comma: text that has it is neither split nor shortened.
    assert ALPHABET[11] == ","
    ids = tokenizer.encode("a, b")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a, b"
    metadata = Metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "<stop>", "▁", "a", "▁a"],
            "tokenizer.ggml.scores": np.zeros(6),
            "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1]),
        }
    )
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.eos_token_ids == {2}
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<s>", "<unk>")
    assert tokenizer.encode("a") == [1, 5]
    assert tokenizer.encode("x") == [1, 3, 0]


def test_special_ids_of_normal_tokens_do_not_change_text(tmp_path):
    letter = ALPHABET.index("a")
    tokenizer = load_written(byte_level("</s>", padding_token_id=letter), tmp_path)
    assert tokenizer.decode([letter, letter], skip_special_tokens=True) == "aa"


def test_tokens_without_types_are_normal(tmp_path):
    metadata = byte_level("<s>", "<stop>", token_type=None, bos_token_id=256, eos_token_id=257)
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.eos_token_ids == {257}
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.encode("hi") == [ALPHABET.index("h"), ALPHABET.index("i")]


@pytest.mark.parametrize("pre", [None, ""])
def test_a_missing_pre_tokenizer_is_the_default_one_with_a_warning(pre, tmp_path, capsys):
    tokenizer = load_written(byte_level("<s>", pre=pre, merges=["1 2"]), tmp_path)
    assert capsys.readouterr().err.startswith("warning: tokenizer.ggml.pre is missing; using")
    assert tokenizer.decode(tokenizer.encode(PARAGRAPH)) == PARAGRAPH


@pytest.mark.parametrize("repeated", ["a", ""])
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_repeated_and_empty_texts_are_decoded(repeated, pre, tmp_path):
    tokens = list(ALPHABET)
    tokens[10], tokens[20] = repeated, repeated
    metadata = byte_level("</s>", pre=pre, tokens=[*tokens, "</s>"], add_bos_token=False)
    tokenizer = load_written(metadata, tmp_path)
    assert len(tokenizer) == 257
    last = ALPHABET.index("a")
    for ids in ([10, 20, last], [20, 10, last]):
        assert tokenizer.decode(ids) == 2 * repeated + "a"
        assert stream(tokenizer, ids) == 2 * repeated + "a"
    assert tokenizer.encode("a") == [last]


def test_a_repeated_special_text_is_one_token_and_stops(tmp_path):
    metadata = byte_level("<|im_end|>", "<|im_end|>", kind=1, eos_token_id=256)
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.eos_token_ids == {256, 257}
    assert tokenizer.encode("<|im_end|>") == [257]


def test_repeated_texts_in_a_sentencepiece_vocabulary(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "a", "", "▁a"]
    metadata = Metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": -np.arange(10.0),
            "tokenizer.ggml.token_type": np.array([2, 3, 3] + [1] * 7),
        }
    )
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.encode("ab") == [1, 9, 5]
    assert tokenizer.decode([9, 5, 6, 7, 8, 4]) == "ab aaa"
    assert stream(tokenizer, [9, 5, 6, 7, 8, 4]) == "ab aaa"


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_ids_beyond_the_tokens_are_no_text(model, tmp_path):
    scores = np.zeros(257) if model == "llama" else None
    metadata = byte_level("<end>", model=model, scores=scores, add_bos_token=False)
    tokenizer = load_written(metadata, tmp_path, rows=300)
    letter = ALPHABET.index("a")
    assert tokenizer.decode([letter, 280, 299, letter]) == "aa"
    assert stream(tokenizer, [letter, 280, 299, letter]) == "aa"
    with pytest.raises(GGUFError, match="257 tokens, but its embedding has 256 rows"):
        write_tokenizer(metadata, tmp_path, rows=256)


def test_merges_of_unknown_tokens_are_ignored_with_a_warning(tmp_path, capsys):
    merges = ["a b", "a c", "ab", "a b c", "a  b", " a b"]
    tokens = [*ALPHABET, "ab"]
    metadata = byte_level(tokens=tokens, token_type=None, merges=merges)
    tokenizer = load_written(metadata, tmp_path)
    assert tokenizer.encode("abac") == [256, ALPHABET.index("a"), ALPHABET.index("c")]
    assert capsys.readouterr().err == (
        "warning: 5 of tokenizer.ggml.merges do not name tokens; ignored\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "it has no tokenizer"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens is 'a', not an array of strings"),
        ({"tokens": np.arange(300)}, r"tokens is \[0, 1, .*\.\.\., not an array of strings"),
        ({"model": None}, "its metadata has no tokenizer.ggml.model"),
        ({"model": "t5"}, "its tokenizer of kind 't5' is not known"),
        ({"model": 7}, "tokenizer.ggml.model is 7, not a string"),
        ({"model": "llama"}, "its SentencePiece vocabulary has no scores"),
        ({"model": "llama", "scores": np.zeros(9)}, "scores has 9 values for 256 tokens"),
        ({"model": "llama", "scores": np.full(256, np.nan)}, "scores are not all floating-point"),
        ({"model": "llama", "scores": np.ones(256, bool)}, "scores are not all floating-point"),
        (
            {"model": "llama", "scores": np.ones(256), "tokens": [*ALPHABET[:-1], "<0x6@>"]},
            "its token '<0x6@>' is not a byte in hexadecimal",
        ),
        ({"model": "llama", "scores": 1.0}, "scores is 1.0, not an array of numbers"),
        ({"token_type": np.ones(9, int)}, "token_type has 9 values for 256 tokens"),
        ({"token_type": np.ones(256)}, "token_type are not integers"),
        ({"token_type": ["1"] * 256}, "token_type is .*, not an array of numbers"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not known, but only default, gpt"),
        ({"pre": ["qwen2"]}, r"tokenizer.ggml.pre is \['qwen2'\], not a string"),
        ({"merges": "a b"}, "tokenizer.ggml.merges is 'a b', not an array of strings"),
        ({"suppress_tokens": np.arange(2)}, "it has tokenizer.ggml.suppress_tokens, which is not"),
        ({"eos_token_id": 3.0}, "tokenizer.ggml.eos_token_id is 3.0, not an integer"),
        ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is True, not an integer"),
        ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id is '2', not an integer"),
        ({"eos_token_id": np.arange(2)}, r"tokenizer.ggml.eos_token_id is \[0, 1\], not an"),
    ],
)
def test_unknown_and_damaged_tokenizers_are_refused(changes, message, tmp_path):
    with pytest.raises(GGUFError, match=message):
        write_tokenizer(byte_level(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_saved_tokenizer_is_plain_json(default_gguf, tmp_path):
    write_tokenizer(read_gguf(default_gguf).metadata, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in config["chat_template"]
