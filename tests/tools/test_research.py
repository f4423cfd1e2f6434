"""The scripts behind docs/experiments.md, on tiny models."""

import json
import sys

from glass_mlx import GlassConfig, GlobalPrior, Session, draft_shortlist, load
from helpers import made_prior, save_tiny_folder

import add_curves
import compare_dense_passes
import compare_drafts
import compare_expert_evidence
import compare_long_texts
import compare_outside
import compare_parts
import compare_priors
import compare_samplers
import compare_schedules
import compare_shortlists
import count_sent_bytes
import mlx.core as mx
import numpy as np
import pytest
import quantize_with_data
import upcycling


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_folder(tmp_path / "tiny")
    made_prior(load(str(folder))[0]).save(folder / "glass_prior.safetensors")
    (tmp_path / "prompts.txt").write_text("丁七丄\n丅丆丏丐\n")
    return folder


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_schedules_are_compared(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_schedules, *arguments, "--dense-every", 0, 4, "--warmup", 8)
    _, _, sparse, dense = capsys.readouterr().out.splitlines()
    kl, speed = ([float(row.split("|")[n]) for row in (sparse, dense)] for n in (4, 6))
    assert kl[0] > kl[1] > 0
    assert speed[0] > speed[1] > 1


def test_schedules_of_drafts_are_compared(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draft_shortlist, "_MAX_COST", 10)
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_drafts, *arguments, "--warmup", 1, 4)
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:3] for row in cells] == [
        [prior, warmup, "16"] for prior in ("yes", "no") for warmup in ("1", "4")
    ]
    assert all(0 < float(row[3]) < 1 for row in cells)
    assert float(cells[2][4]) > 0


def test_samplers_are_compared(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draft_shortlist, "_MAX_COST", 10)
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_samplers, *arguments, "--temp", 1)
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:2] for row in cells] == [["1", name] for name in compare_samplers.SAMPLERS]
    assert all(int(row[2]) > 0 and float(row[3]) >= 1 and float(row[4]) > 0 for row in cells)
    assert float(cells[0][3]) > float(cells[1][3])


def test_choices_in_parts_are_compared(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_parts, *arguments, "--parts", 1, 4, "--density", 0.5, "--same-count")
    _, _, one, four = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert float(one[3]) == float(four[3]) == 0.5
    assert float(one[4]) > 0
    assert float(four[4]) > 0


def test_sent_bytes_are_counted(folder, monkeypatch, capsys):
    """With a single rank there is nobody to send to."""
    run(monkeypatch, count_sent_bytes, "--model", folder, "--prompt", "丁七丄", "--tokens", 20)
    first, _, _, dense, sliced = capsys.readouterr().out.splitlines()
    assert first == "1 ranks"
    assert [cell.strip() for cell in dense.split("|")[2:6]] == ["23", "0", "0", "0"]
    assert [cell.strip() for cell in sliced.split("|")[2:6]] == ["23", "0", "0", "0"]


def test_priors_are_compared(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 20]
    prior = folder / "glass_prior.safetensors"
    run(monkeypatch, compare_priors, *arguments, "--prior", prior, "--density", 0.5)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    kl = {row[2].strip(): float(row[3]) for row in rows}
    assert kl["oracle"] > 0
    assert len(kl) > 3


def test_shortlists_are_compared(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_shortlists, *arguments, "--texts", 4, "--share", 0.25, 0.5)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2 * 3 * len(compare_shortlists.FUNCTIONS)
    kl = {tuple(cell.strip() for cell in row[1:4]): float(row[4]) for row in rows}
    assert all(kl["0.25", name, w] >= kl["0.5", name, w] > 0 for _, name, w in kl)


def test_curves_of_a_quantized_model_are_measured_as_floats(tmp_path, monkeypatch):
    folder = save_tiny_folder(tmp_path / "tiny", group_size=32, bits=4)
    model, _ = load(str(folder), dtype="float32")
    prior_file, output = tmp_path / "prior.safetensors", tmp_path / "with.safetensors"
    made_prior(model).save(prior_file)
    policies = ["neuron-major", "requantize"]
    arguments = ["--model", folder, "--prior", prior_file, "--output", output, "--texts", 4]
    for _ in range(2):  # curves replace those of the same conditions
        run(monkeypatch, add_curves, *arguments, "--floats", "--down-policy", *policies)
        arguments[arguments.index("--prior") + 1] = output
    prior, session = GlobalPrior.load(output), Session(model)
    assert len(prior.about["curves"]) == 1 + len(policies)
    for policy in policies:
        curve = prior.curve(session.conditions(GlassConfig(down_policy=policy)))
        assert curve.kl[0] > 0


@pytest.mark.parametrize(("kind", "experts"), [("copies", 4), ("clusters", 2)])
def test_evidence_of_experts_is_compared(folder, tmp_path, monkeypatch, capsys, kind, experts):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    sizes = ["--experts", experts, "--sequences", 4, "--length", 40, "--prior", tmp_path / "prior"]
    for _ in range(2):  # the second run reads the prior
        run(monkeypatch, compare_expert_evidence, *arguments, *sizes, "--kind", kind)
        first, _, _, *rows = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{kind}: {experts} experts, 2 a token")
        cells = [[cell.strip() for cell in row.split("|")] for row in rows]
        kl = {row[1]: float(row[3]) for row in cells}
        assert len(kl) == len(compare_expert_evidence.WAYS) - (kind == "clusters")
        assert all(value > 0 for value in kl.values())


def test_copies_compute_what_the_dense_model_does(folder):
    model, _ = load(str(folder))
    tokens = mx.array([[1, 7, 3, 200, 9, 54, 21]])
    texts = np.random.default_rng(0).integers(0, 256, (3, 40)).tolist()
    copies = upcycling.upcycle(model, texts, "copies", 4, 2)
    assert mx.allclose(copies(tokens), model(tokens), atol=1e-4)
    clusters = upcycling.upcycle(model, texts, "clusters", 4, 4)  # all experts: all neurons
    assert mx.allclose(clusters(tokens), model(tokens), atol=1e-4)
    fewer = upcycling.upcycle(model, texts, "clusters", 4, 2)
    assert not mx.allclose(fewer(tokens), model(tokens), atol=1e-2)
    assert {ffn.shape for ffn in Session(copies).ffns} == {(4, 128)}
    assert {ffn.shape for ffn in Session(clusters).ffns} == {(4, 32)}


def test_expectations_of_the_probability_outside_are_compared(
    folder, tmp_path, monkeypatch, capsys
):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_outside, *arguments, "--share", 0.5, "--factor", 0.2)
    _, _, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    kl = {row[2].strip(): float(row[4]) for row in rows}
    assert kl["the truth"] < kl["the mean"]
    assert kl["the truth"] < kl["0.2"]


def test_dense_passes_are_compared(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 60]
    run(monkeypatch, compare_dense_passes, *arguments, "--rows", 1, 4)
    lines = capsys.readouterr().out.splitlines()
    whole, every, some = ([float(cell) for cell in line.split("|")[2:4]] for line in lines[2:5])
    assert every[0] < some[0] < 1
    assert whole[0] < 1
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["1", "4"]


@pytest.mark.parametrize("method", quantize_with_data.METHODS)
def test_models_are_quantized_with_data(folder, tmp_path, monkeypatch, capsys, method):
    output = tmp_path / method
    sizes = ["--samples", 4, "--length", 16, "--group-size", 32, "--bits", 3, "--target-bits", 4.5]
    arguments = ["--model", folder, "--method", method, "--output", output, *sizes]
    run(monkeypatch, quantize_with_data, *arguments)
    assert "64 tokens" in capsys.readouterr().out
    tokens = mx.array([[1, 7, 3, 200, 9, 54, 21]])
    model, quantized = (load(str(f), dtype="float32", dequantize=True)[0] for f in (folder, output))
    error = mx.linalg.norm(quantized(tokens) - model(tokens)) / mx.linalg.norm(model(tokens))
    assert 0.01 < error.item() < 0.5
    stored, _ = load(str(output))
    bits = 32 * Session(stored).weight_bytes / Session(model).weight_bytes
    assert 4.1 < bits < 4.75 if method == "dynamic" else bits < 4.1
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, quantize_with_data, *arguments)
    assert "there is something at" in capsys.readouterr().err


def test_long_texts_are_compared_and_continue(folder, tmp_path, monkeypatch, capsys):
    document, out = tmp_path / "document.txt", tmp_path / "out.jsonl"
    document.write_text("丁七丄丅丆万丈三上下" * 30)
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 200]
    arguments += ["--document", document, "--prompt-tokens", 0, 250, "--density", 0.5]
    # The tiny model's heads are too narrow for a cache of 8 bits.
    kinds_of_cache = {"plain": {}, "a quarter": {"max_kv_size": 100}}
    monkeypatch.setattr(compare_long_texts, "caches", lambda tokens: kinds_of_cache)
    run(monkeypatch, compare_long_texts, *arguments, "--json", out, "--generate")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    scored = [row for row in rows if row["what"] == "kl"]
    generated = [row for row in rows if row["what"] == "generation"]
    assert [(row["prompt_tokens"], row["text"]) for row in scored] == [
        (0, 0), (0, 1), (250, 0), (250, 1),
    ]  # fmt: skip
    for row in scored:
        assert len(row["kl_by_position"]) == 7  # 199 scored tokens
        assert row["kl"] > 0
        # The first 16 tokens are dense, so the first 32 are closer than half sliced ones.
        assert row["kl_by_position"][0] < max(row["kl_by_position"])
    kinds = [(row["prompt_tokens"], row["cache"], row["method"]) for row in generated]
    methods = ("dense", "default")
    assert kinds == [(p, c, m) for p in (0, 250) for c in kinds_of_cache for m in methods]
    assert all(row["total_tps"] > 0 and row["held_gb"] > 0 for row in generated)
    scores, generations = capsys.readouterr().out.split("\n\n")
    assert scores.splitlines()[0].endswith("| KL | to 128 | to 224 |")
    assert len(scores.splitlines()) == 4
    assert len(generations.splitlines()) == 2 + len(generated)
    # By default, nothing is lost. What is there is not measured again.
    run(monkeypatch, compare_long_texts, *arguments, "--json", out, "--max-kl", 0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kl"] for row in rows if row["max_kl"] == 0] == [0] * 4
    monkeypatch.setattr(compare_long_texts, "score", None)
    monkeypatch.setattr(compare_long_texts, "time_run", None)
    run(monkeypatch, compare_long_texts, *arguments, "--json", out, "--generate")
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_a_document_must_be_long_enough(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("丁七丄")
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--json"]
    arguments += [tmp_path / "out.jsonl", "--document", tmp_path / "short.txt"]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, compare_long_texts, *arguments, "--density", 0.5)
    assert "the document has 3 tokens, and not 4000" in capsys.readouterr().err
