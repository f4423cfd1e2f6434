"""Calibration texts."""

import json
import os

from glass_mlx.calibration.texts import (
    SKIPPED_POSITIONS,
    ChatFrame,
    Recipe,
    Sequence,
    chat_frame,
    make_source,
    pad,
)
from glass_mlx.models.architectures import tiny_model
from glass_mlx.writing import Writer
from helpers import chat_tokenizer, letter_tokenizer

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

TOKENIZER = chat_tokenizer()
USER, ANSWER, END, BOS = TOKENIZER.encode("上下不丁")


def writer(progress=lambda count: None):
    return Writer(tiny_model("llama"), 1.0, [0], progress)


def sequences(recipe, length=40, size=3, batch=0, tokenizer=TOKENIZER, **options):
    frame = chat_frame(tokenizer) if recipe.kind == "chat" else None
    return make_source(recipe, writer(), tokenizer, length, frame, **options)(size, batch)


def corpus(tmp_path, name, *records):
    file = tmp_path / name
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    file.write_text("\n".join(lines), encoding="utf-8")
    return Recipe("corpus", 1.0, file)


@pytest.mark.parametrize(
    ("text", "kind", "weight", "file"),
    [
        ("bos", "bos", 1.0, None),
        ("chat=0.25", "chat", 0.25, None),
        ("corpus:notes.txt", "corpus", 1.0, "notes.txt"),
        ("corpus:a/b.jsonl=3", "corpus", 3.0, "a/b.jsonl"),
        ("corpus:a=b.txt", "corpus", 1.0, "a=b.txt"),
        ("corpus:a=b.txt=2", "corpus", 2.0, "a=b.txt"),
    ],
)
def test_recipes_are_parsed(text, kind, weight, file):
    recipe = Recipe.parse(text)
    assert (recipe.kind, recipe.weight) == (kind, weight)
    assert (str(recipe.file) if recipe.file else None) == file


@pytest.mark.parametrize("text", ["", "poem", "corpus", "corpus:", "bos:x", "bos=0", "chat=nan"])
def test_malformed_recipes_are_refused(text):
    with pytest.raises(ValueError, match="recipe"):
        Recipe.parse(text)


def test_bos_starts_with_its_token_and_skips_early_positions():
    for sequence in sequences(Recipe("bos")):
        assert sequence.tokens[0] == BOS
        assert len(sequence.tokens) == len(sequence.mask) == 41
        assert sequence.mask == [0] * SKIPPED_POSITIONS + [1] * (41 - SKIPPED_POSITIONS)


def test_the_text_depends_on_the_batch():
    for recipe in (Recipe("bos"), Recipe("chat")):
        assert sequences(recipe) == sequences(recipe)
        assert sequences(recipe, batch=1) != sequences(recipe)
        rows = [tuple(s.tokens) for s in sequences(recipe)]
        assert len({*rows}) == 3


def test_chat_writes_a_turn_and_an_answer_and_counts_the_answer():
    assert chat_frame(TOKENIZER) == ChatFrame([USER], [END, ANSWER], [END])
    for sequence in sequences(Recipe("chat"), size=8):
        assert sequence.tokens[0] == USER
        start = sequence.mask.index(1)
        assert sequence.tokens[start - 2 : start] == [END, ANSWER]
        turn, answer = sequence.tokens[1 : start - 2], sequence.tokens[start:]
        assert END not in turn
        assert END not in answer[:-1]
        assert len(turn) <= 10
        assert len(turn) + len(answer) == 40 or answer[-1] == END
        # decoding stops at the end token and never reads it
        count = len(answer) - (answer[-1] == END)
        assert sequence.mask == [0] * start + [1] * count + [0] * (len(answer) - count)


def test_without_special_tokens_everything_before_the_answer_ends_a_turn():
    plain = letter_tokenizer()
    plain.chat_template = "上{{ messages[0].content }}下丄"
    frame = chat_frame(TokenizerWrapper(plain, eos_token_ids=[END]))
    assert frame.end == frame.after == TOKENIZER.encode("下丄")


def test_a_template_with_a_date_gives_the_same_text_every_day():
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}"
        "{{ date_string }}上{{ messages[0].content }}不"
    )
    tokenizer = TokenizerWrapper(tokenizer, eos_token_ids=[END])
    assert chat_frame(tokenizer) == chat_frame(tokenizer)


def test_progress_counts_every_written_token():
    steps = []
    make_source(Recipe("bos"), writer(progress=steps.append), TOKENIZER, 40)(3, 0)
    assert sum(steps) == 3 * 40


def test_a_missing_template_or_first_token_is_reported():
    plain = TokenizerWrapper(letter_tokenizer())
    with pytest.raises(ValueError, match="no chat template"):
        sequences(Recipe("chat"), tokenizer=plain)
    plain = letter_tokenizer()
    plain.chat_template = "上{{ messages[0].content | length }}下"
    with pytest.raises(ValueError, match="hides the user's turn"):
        sequences(Recipe("chat"), tokenizer=TokenizerWrapper(plain))
    plain.chat_template = "{{ raise_exception('no\nsuch') }}"
    with pytest.raises(ValueError, match=r"template fails \(no such\)"):
        sequences(Recipe("chat"), tokenizer=TokenizerWrapper(plain))
    plain.bos_token = None
    with pytest.raises(ValueError, match="neither a beginning- nor"):
        sequences(Recipe("bos"), tokenizer=TokenizerWrapper(plain, eos_token_ids=[END]))


def test_long_texts_are_cut_into_windows_that_start_with_bos(tmp_path):
    letters = "".join(chr(0x4E20 + n) for n in range(100))
    recipe = corpus(tmp_path, "a.txt", letters)
    windows = sequences(recipe, size=9)
    assert [len(s.tokens) for s in windows] == [41, 41, 21]
    assert all(s.tokens[0] == BOS for s in windows)
    assert all(s.mask[:SKIPPED_POSITIONS] == [0] * SKIPPED_POSITIONS for s in windows)
    # Together, the windows have every token of the text once.
    assert [token for s in windows for token in s.tokens[1:]] == TOKENIZER.encode(letters)
    assert sequences(recipe, size=9, done=2) == windows[2:]
    assert sequences(recipe, size=9, done=3) == []


def test_a_corpus_has_fields_and_conversations(tmp_path):
    long = "丈" * 30
    messages = [
        {"role": "user", "content": "丆丆"},
        {"role": "assistant", "content": "丅"},
        {"role": "user", "content": "丄"},
        {"role": "assistant", "content": "丄丄"},
    ]
    recipe = corpus(
        tmp_path,
        "a.jsonl",
        {"text": long},
        "",
        {"messages": messages},
        {"prompt": "丆丆", "completion": "丅"},
    )
    text, talk, pair = sequences(recipe, size=9)
    assert text.tokens == [BOS, *TOKENIZER.encode(long)]
    assert talk.tokens == TOKENIZER.encode("上丆丆不下丅不上丄不下丄丄不")
    assert talk.mask == [0] * 5 + [1] * 9
    assert pair.tokens == TOKENIZER.encode("上丆丆不下丅不")
    assert pair.mask == [0] * 5 + [1] * 2

    plain = TokenizerWrapper(letter_tokenizer())
    assert sequences(recipe, size=9, tokenizer=plain)[2].mask[:2] == [0, 0]
    body = corpus(tmp_path, "b.jsonl", {"body": long})
    assert sequences(body, field="body")[0].tokens == text.tokens


def test_a_record_without_text_is_refused(tmp_path):
    recipe = corpus(tmp_path, "a.jsonl", '{"body": 1}')
    with pytest.raises(ValueError, match=r"line 1 .* has neither text nor messages nor prompt"):
        sequences(recipe, size=9)
    recipe = corpus(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": 3}')
    with pytest.raises(ValueError, match=r"line 2 .*, text, is not text, but 3"):
        sequences(recipe, size=9)


def test_conversations_count_from_their_first_answer(tmp_path):
    """Content may be a list of parts; without an answer nothing counts."""
    parts = [{"type": "text", "text": "丈三"}, {"type": "text", "text": "上"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "下丅不"}]
    joined = [talk[0] | {"content": "丈三上"}, talk[1]]
    sharegpt = [{"from": "human", "value": "丈三上"}, {"from": "gpt", "value": "下丅不"}]
    recipe = corpus(
        tmp_path,
        "a.jsonl",
        {"messages": talk},
        {"messages": joined},
        {"conversations": sharegpt},
        {"prompt": "丈三上", "completion": "下丅不"},
        {"prompt": "丈三上", "completion": None},
        {"messages": joined[1:]},
    )
    first, *others, answer = sequences(recipe, size=9)
    assert others == [first] * 3
    assert 0 < sum(first.mask) < len(first.mask)
    assert sum(answer.mask) == len(answer.mask)  # an assistant's message that comes first


def test_byte_order_marks_and_line_ends_of_windows_do_not_count(tmp_path):
    recipes = [corpus(tmp_path, name, "丈三上丁丈丁") for name in ("a.txt", "b.txt")]
    text = recipes[1].file.read_bytes()
    recipes[0].file.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n" + text)
    recipes[1].file.write_bytes(text + b"\n" + text)
    one, two = (sequences(recipe, size=9) for recipe in recipes)
    assert one == two


def test_a_binary_corpus_a_folder_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("丈\n".encode() + b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"line 2 of the corpus .*a\.txt is not UTF-8 text"):
        sequences(Recipe("corpus", 1.0, tmp_path / "a.txt"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(ValueError, match="is not a regular file"):
            Recipe("corpus", 1.0, tmp_path / name).identity()


def test_a_corpus_is_identified_by_its_contents(tmp_path):
    one, two = corpus(tmp_path, "a.txt", "丈"), corpus(tmp_path, "b.txt", "上")
    assert one.identity()["sha256"] != two.identity()["sha256"]
    with pytest.raises(FileNotFoundError, match="there is no corpus at"):
        Recipe("corpus", 1.0, tmp_path / "c.txt").identity()


def test_padding_does_not_count():
    ids, mask = pad([Sequence([1, 2, 3], [0, 1, 1]), Sequence([4], [1])])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[0, 1, 1], [1, 0, 0]]
