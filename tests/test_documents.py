"""Text and JSONL files of users, as people really have them."""

import json
import os
import threading
from pathlib import Path

from glass_mlx.documents import read_lines, read_messages, read_records
from glass_mlx.fidelity.prompts import read_prompts

import pytest

HI = [{"role": "user", "content": "hi"}]


def jsonl(tmp_path, *lines):
    file = tmp_path / "a.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "record",
    [
        {"messages": HI},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "hi"]}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"prompt": "hi"},
        {"prompt": "hi", "completion": None, "messages": None},
    ],
)
def test_every_form_of_one_message_is_read(record):
    assert read_messages(record, "here") == HI


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": 3}, "here has no messages, but 3"),
        ({"messages": []}, "here has no messages"),
        ({"messages": [3]}, "a message without a role: 3"),
        ({"messages": [{"content": "hi"}]}, "a message without a role"),
        ({"messages": [{"role": "user"}]}, "message 1, is not text, but null"),
        ({"messages": [*HI, {"role": "user", "content": 3}]}, "message 2, is not text, but 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'message 1, has a part that is not text, but {"type": "image_url"}',
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "a part that is not text"),
        ({"messages": [{"role": "user", "content": []}]}, "message 1, is not text"),
        ({"conversations": [{"from": "dog", "value": "hi"}]}, "not from human, gpt, system"),
        ({"conversations": {}}, "are not a list"),
        ({"conversations": [{"from": "gpt"}]}, "is not text, but null"),
        ({"prompt": 3}, "prompt, is not text, but 3"),
        ({"prompt": "a\ud83d"}, "prompt, is not valid UTF-8 text"),
        ({"prompt": "a", "completion": {"x": 1}}, "completion, is not text"),
    ],
)
def test_a_malformed_message_is_refused_with_the_reason(record, reason):
    with pytest.raises(ValueError) as error:
        read_messages(record, "here")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON (Expecting"),
        ("[1]", "is not a JSON object, but [1]"),
        ("null", "is not a JSON object, but null"),
        ("[" * 100000, "is nested too deeply"),
        ("NaN", "is not a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_refused_with_its_place(tmp_path, line, reason):
    file = jsonl(tmp_path, {"prompt": "hi"}, "", line)
    with pytest.raises(ValueError) as error:
        list(read_records(file, "corpus"))
    assert str(error.value).startswith(f"line 3 of the corpus {file} {reason}")


def test_byte_order_marks_line_ends_and_empty_lines_are_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "hi"}\r\n\r\n{"prompt": "hi"}')
    assert read_prompts(file) == [HI, HI]
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfhi\r\n\r\nhi\r\n")
    assert read_prompts(text) == [HI, HI]


def test_files_that_are_not_text_are_refused(tmp_path):
    file = tmp_path / "[a].txt"
    file.write_bytes(b"hi\ncaf\xe9\n")
    with pytest.raises(
        ValueError, match=r"line 2 of the prompts file .*\[a\]\.txt is not UTF-8 text"
    ):
        read_prompts(file)
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path)
    (tmp_path / "a.json").write_text('[{"prompt": "hi"}]')
    with pytest.raises(ValueError, match="is JSON; give text, or JSONL"):
        read_prompts(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="there is no corpus at"):
        list(read_lines(tmp_path / "none", "corpus"))


@pytest.mark.parametrize("text", ["hi\nhi\n", '\n{"prompt": "hi"}\n{"prompt": "hi"}'])
def test_prompts_of_both_forms_can_come_through_a_pipe(tmp_path, text):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[text])
    writer.start()
    assert read_prompts(pipe) == [HI, HI]
    writer.join()


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
def test_the_ending_of_a_name_tells_jsonl(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "hi"}')
    assert read_prompts(tmp_path / name) == [HI]
    (tmp_path / "a.txt").write_text('{"prompt": "hi"}')
    assert read_prompts(tmp_path / "a.txt")[0][0]["content"] == '{"prompt": "hi"}'


def test_a_device_is_refused_because_it_may_never_end():
    with pytest.raises(ValueError, match="/dev/zero is neither a file nor a pipe"):
        read_prompts(Path("/dev/zero"))
