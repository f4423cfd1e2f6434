"""The comparison of what counts as prompt and as text in a conversation."""

import sys

from glass_mlx.models.architectures import tiny_model
from glass_mlx.session import Session
from helpers import CHAT_TEMPLATE, letter_tokenizer, made_prior, save_tiny_folder

import compare_turns
import pytest


def test_every_case_is_scored(tmp_path, monkeypatch, capsys):
    folder, prompts = save_tiny_folder(tmp_path / "tiny"), tmp_path / "prompts.txt"
    made_prior(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    prompts.write_text("丁七丄\n丈三\n丙丁\n", encoding="utf-8")
    options = ["--model", str(folder), "--prompts", str(prompts), "--limit", "2"]
    monkeypatch.setattr("sys.argv", ["compare_turns", *options, "--tokens", "40"])
    compare_turns.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == [*compare_turns.CASES] * 2
    assert all(float(row[3]) > 0 and row[4] == "2" for row in rows)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--new-subject"])
    compare_turns.main()
    changed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in changed] == [row[2] for row in rows]
    assert [row[3] for row in changed] != [row[3] for row in rows]
    monkeypatch.setattr("sys.argv", [*sys.argv, "--limit", "1"])
    with pytest.raises(SystemExit, match="2"):
        compare_turns.main()
    assert "at least two prompts" in capsys.readouterr().err


def test_the_next_subject_is_the_next_prompt():
    prompts = [[{"role": "user", "content": text}] for text in "abc"]
    assert compare_turns.second_prompts(prompts, True) == ["b", "c", "a"]
    assert len({*compare_turns.second_prompts(prompts, False)}) == 1


def test_each_part_of_a_conversation_counts_as_prompt_or_text():
    session, parts = Session(tiny_model("llama")), [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
    observed = compare_turns.observe_parts(session, parts)
    for name, (_, prompt, text) in compare_turns.CASES.items():
        assert observed[name].prompt.tokens == sum(len(parts[n]) for n in prompt)
        assert observed[name].text.tokens == sum(len(parts[n]) for n in text)
