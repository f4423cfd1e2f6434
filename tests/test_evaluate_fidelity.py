"""The tool that measures fidelity, on a tiny model, and the figures that it makes."""

import json
import sys

import evaluate_fidelity as tool
import fidelity_report as report
from glass_mlx.models.architectures import tiny_model
from tasks import TASKS, write_task
from test_checkpoints import save_tiny_folder
from test_prior import made_prior

import numpy as np
import pytest

STATIC = ["dense", "random", "magnitude", "prompt-only", "prior-only", "glass", "oracle"]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_folder(tmp_path / "tiny")
    made_prior(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    (tmp_path / "prompts.txt").write_text("丁七丄\n丅丆丏丐\n丂丏\n")
    return ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 40]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate_fidelity", *map(str, arguments)])
    tool.main()


def rows(file):
    return {
        (row["method"], row["density"]): row
        for row in map(json.loads, file.read_text().splitlines())
    }


def test_every_method_gives_a_line_with_all_figures(arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    methods = [name for name in tool.METHODS if name != "glass-impact"]
    run(
        monkeypatch, *arguments, "--json", out, "--density", 0.5, 0.75, "--methods", *methods,
        "--mix", 0, 0.25, "--plots", tmp_path / "plots", "--markdown", tmp_path / "table.md",
    )  # fmt: skip
    found = rows(out)
    assert len(found) == 2 * (len(methods) + 2)
    for (method, density), row in found.items():
        assert row["perplexity_95"][0] <= row["perplexity"] <= row["perplexity_95"][1]
        assert row["kl_95"][0] <= row["kl"] <= row["kl_95"][1]
        assert (row["prompts"], row["tokens"], row["seed"]) == (3, 120, 0)
        assert row["density_got"] == (1 if method == "dense" else density)
        assert 0 <= row["top1"] <= 1
        assert ("kl_change" in row) == (method != "prompt-only")
    dense, oracle = found["dense", 0.5], found["oracle", 0.5]
    assert (dense["kl"], dense["dense_share"], dense["top1"]) == (0, 1, 1)
    assert (oracle["jaccard"], oracle["dense_share"]) == (1, 1 / 40)
    assert found["glass λ 0", 0.5]["kl"] == found["prompt-only", 0.5]["kl"]
    assert found["glass λ 0.25", 0.5]["kl"] != found["prompt-only", 0.5]["kl"]
    # 16 tokens of warm-up, and one when 16 more are read again at 32.
    assert found["default", 0.5]["dense_share"] == 17 / 40
    assert found["default", 0.5]["reread_share"] == 16 / 40
    table = capsys.readouterr().out
    assert table.count("\n") == len(found) + 1
    assert (tmp_path / "table.md").read_text().count("\n") == len(found) + 2
    for name in ("kl_by_density", "kl_by_position", "jaccard_by_layer", "kl_by_mix"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_interrupted_run_goes_on_to_the_same_file(arguments, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(monkeypatch, *arguments, "--json", whole, "--methods", *STATIC)
    scored = []
    original = tool.Evaluation.__call__

    def interrupted(self, text, answers, number):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(number)
        return original(self, text, answers, number)

    with monkeypatch.context() as patched:
        patched.setattr(tool.Evaluation, "__call__", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run(patched, *arguments, "--json", broken, "--methods", *STATIC)
    partial = tmp_path / "broken.jsonl.partial"
    partial.write_text(partial.read_text() + '[["half a li')  # and the machine went down
    assert not broken.exists()
    with pytest.raises(SystemExit, match="2"):  # another seed is another evaluation
        run(monkeypatch, *arguments, "--json", broken, "--methods", *STATIC, "--seed", 1)
    scored.clear()
    monkeypatch.setattr(tool.Evaluation, "__call__", interrupted)
    run(monkeypatch, *arguments, "--json", broken, "--methods", *STATIC)
    assert scored == [2]
    assert broken.read_text() == whole.read_text()


def test_bad_input_ends_with_a_sentence(arguments, tmp_path, monkeypatch, capsys):
    for more, message in (
        (["--prompts", tmp_path / "none"], "no prompts at"),
        (["--density", 0.5, 2], "density"),
        (["--temp", 0], "temperature of sampling must be positive"),
        (["--tokens", 1], "--tokens must be at least 2"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
        (["--limit", 0], "--limit must be at least 1"),
        (["--ablation", "margins", "--json", tmp_path / "x"], "writes no files"),
        (["--mix", 3], "between 0 and 1"),
        (["--methods", "glass-impact"], "no statistic 'impact'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *arguments, *more)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("evaluate_fidelity: error: ")
        assert message in error


@pytest.mark.parametrize("ablation", tool.ABLATIONS)
def test_ablations_give_a_table(arguments, monkeypatch, capsys, ablation):
    run(monkeypatch, *arguments, "--ablation", ablation, "--tokens", 90)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("kind", TASKS)
def test_the_answers_of_a_task_are_where_it_says(default_model, kind):
    _, tokenizer = default_model
    texts = list(write_task(kind, tokenizer, 2, seed=3))
    assert texts == list(write_task(kind, tokenizer, 2, seed=3))
    for text, answers in texts:
        lines = tokenizer.decode(text.written).strip().splitlines()
        assert len(lines) == len(answers) == 16
        for line, (start, stop) in zip(lines, answers, strict=True):
            # Scored tokens are all written ones but the first.
            answer = tokenizer.decode(text.written[start + 1 : stop + 1])
            assert line.endswith(answer)
            question = line.removesuffix(answer)
            if kind == "arithmetic":
                a, _, b, _ = question.split()
                assert int(answer) == int(a) + int(b)
            else:
                assert f"Say{answer}:" == question


def outcome(kl, nll):
    return report.Outcome(kl, nll, 0.5, [], 1, 0, 0.5, [0.5])


def test_intervals_are_of_prompts_and_differences_are_paired():
    rng = np.random.default_rng(0)
    base = [outcome([float(k)] * 10, [float(k)] * 10) for k in rng.uniform(1, 5, 40)]
    better = [outcome([k * 0.9 for k in o.kl], o.nll) for o in base]
    row = report.row(better, base, seed=0)
    # All prompts gain a tenth: the difference is sure, though the mean is not.
    assert row["kl_change"] == pytest.approx(-0.1)
    assert np.allclose(row["kl_change_95"], -0.1)
    low, high = row["kl_95"]
    spread = 1.96 * np.std([o.kl[0] for o in better]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * spread, rel=0.15)


def test_texts_that_are_never_sliced_do_not_count_as_agreement():
    row = report.row([outcome([1.0], [1.0]), report.Outcome([0.0], [1.0], 1, [], 2, 0, None, [])],
                     [outcome([0.0], [1.0])] * 2, seed=0)  # fmt: skip
    assert (row["density_got"], row["jaccard"], row["jaccard_by_layer"]) == (0.5, 0.5, [0.5])
    assert "kl_change" not in row  # from nothing


def test_figures_weigh_tokens_alike():
    row = report.row([outcome([1.0], [2.0]), outcome([4.0] * 3, [6.0] * 3)], None, seed=0)
    assert row["kl"] == pytest.approx(13 / 4)
    assert row["perplexity"] == pytest.approx(np.exp(5.0))
    assert row["tokens"] == 6
    assert row["dense_share"] == pytest.approx(2 / 6)
