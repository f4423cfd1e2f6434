"""The comparison of carried statistics with those of a new cache."""

from glass_mlx import GlassConfig
from glass_mlx.models.architectures import tiny_model
from glass_mlx.session import Session
from helpers import chat_tokenizer, made_prior, save_chat_folder

import compare_carried
import numpy as np

PARTS = [[1, 7, 3, 200], [9, 54, 21, 9, 54, 22, 8, 31], [77, 5]]


def test_every_subject_and_kind_of_statistics_is_scored(tmp_path, monkeypatch, capsys):
    folder, prompts = save_chat_folder(tmp_path / "tiny"), tmp_path / "prompts.txt"
    prompts.write_text("丁七丄\n丈三\n", encoding="utf-8")
    options = ["--model", str(folder), "--prompts", str(prompts), "--tokens", "40"]
    monkeypatch.setattr("sys.argv", ["compare_carried", *options, "--density", "0.5"])
    compare_carried.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [subject, "`--density 0.5 --vocabulary 1`", name]
        for subject in compare_carried.SUBJECTS
        for name in compare_carried.STATISTICS
    ]
    assert all(float(row[3].split()[0]) > 0 and row[4] == "2" for row in rows)
    assert rows[0][3] != rows[1][3]
    monkeypatch.setattr("sys.argv", ["compare_carried", *options, "--max-kl", "0"])
    compare_carried.main()
    assert capsys.readouterr().out.count(" 0.000 ± 0.000 ") == 4


def test_the_first_answer_is_the_given_one_and_counts_as_generated():
    model = tiny_model("llama")
    config = GlassConfig(density=0.5, warmup=3)
    prompt, answer, second = PARTS
    cache = compare_carried.carried_cache(
        Session(model), chat_tokenizer(), made_prior(model), PARTS, config
    )
    assert cache.tokens == [*prompt, *answer, *second]
    assert 2 < cache.statistics.text.tokens < len(answer)
    new = compare_carried.make_prompt_cache(Session(model))
    compare_carried.read_prompt(Session(model), cache.tokens, new)
    assert new.statistics.text.tokens == 0
    for one, two in zip(cache, new, strict=True):
        keys = [np.array(layer.state[0][..., : len(prompt), :]) for layer in (one, two)]
        assert np.allclose(*keys, atol=1e-5)
