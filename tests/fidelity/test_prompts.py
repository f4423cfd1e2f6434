"""Files of prompts."""

import json

from glass_mlx.fidelity.prompts import read_prompts

import pytest


def test_prompts_are_read_from_text_and_jsonl(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [m[0]["content"] for m in read_prompts(text)] == ["one", "two"]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    assert read_prompts(lines) == [[{"role": "user", "content": "one"}], chat]


@pytest.mark.parametrize(
    "content", ["{", '{"text": "no"}', "[1]", '{"messages": []}', '{"messages": [{"role": 1}]}', ""]
)
def test_bad_prompts_are_refused(tmp_path, content):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"prompts"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="no prompts"):
        read_prompts(tmp_path / "none")
