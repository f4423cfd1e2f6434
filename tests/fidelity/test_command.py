"""The fidelity command on a tiny model."""

import json
import shutil
import sys

import glass_mlx.fidelity.__main__ as command
from glass_mlx.models.architectures import tiny_model
from glass_mlx.session import Session
from helpers import made_prior, save_tiny_folder

import mlx.core as mx
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
    command.main()


def rows(file):
    return {
        (row["method"], row["density"]): row
        for row in map(json.loads, file.read_text().splitlines())
    }


def test_every_method_yields_a_row_with_all_figures(arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    methods = [name for name in command.METHODS if name != "glass-impact"]
    run(
        monkeypatch, *arguments, "--json", out, "--density", 0.5, 0.75, "--methods", *methods,
        "--prior-weight", 0, 0.25, "--plots", tmp_path / "plots",
        "--markdown", tmp_path / "table.md",
    )  # fmt: skip
    results = rows(out)
    assert len(results) == 2 * (len(methods) + 2)
    for (method, density), row in results.items():
        assert row["perplexity_95"][0] <= row["perplexity"] <= row["perplexity_95"][1]
        assert row["kl_95"][0] <= row["kl"] <= row["kl_95"][1]
        assert (row["prompts"], row["tokens"], row["seed"]) == (3, 120, 0)
        assert row["density_got"] == (1 if method == "dense" else density)
        assert 0 <= row["top1"] <= 1
        assert row["flip_rate"] == pytest.approx(1 - row["top1"])
        assert ("kl_change" in row) == (method != "prompt-only")
    dense, oracle = results["dense", 0.5], results["oracle", 0.5]
    assert (dense["kl"], dense["dense_share"], dense["top1"]) == (0, 1, 1)
    assert (oracle["jaccard"], oracle["dense_share"]) == (1, 1 / 40)
    assert results["glass λ 0", 0.5]["kl"] == results["prompt-only", 0.5]["kl"]
    assert results["glass λ 0.25", 0.5]["kl"] != results["prompt-only", 0.5]["kl"]
    # 16 warm-up tokens are dense, and then every fourth token.
    default = results["default", 0.5]
    assert default["dense_share"] == (16 + 6) / 40
    assert default["bytes_share"] < default["run_share"] < 1
    assert default["run_share"] == pytest.approx((15 + 6 + 18 * default["bytes_share"]) / 39)
    table = capsys.readouterr().out
    assert table.count("\n") == len(results) + 1
    assert (tmp_path / "table.md").read_text().count("\n") == len(results) + 2
    for name in ("kl_by_density", "kl_by_position", "jaccard_by_layer", "kl_by_mix"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_interrupted_run_resumes_to_the_same_file(arguments, tmp_path, monkeypatch):
    whole_file, resumed_file = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(monkeypatch, *arguments, "--json", whole_file, "--methods", *STATIC)
    scored_samples = []
    original = command.Evaluation.score

    def score_or_interrupt(self, sample, number):
        if len(scored_samples) == 2:
            raise KeyboardInterrupt
        scored_samples.append(number)
        return original(self, sample, number)

    with monkeypatch.context() as patched:
        patched.setattr(command.Evaluation, "score", score_or_interrupt)
        with pytest.raises(SystemExit, match="130"):
            run(patched, *arguments, "--json", resumed_file, "--methods", *STATIC)
    partial = tmp_path / "broken.jsonl.partial"
    partial.write_text(partial.read_text() + '[["half a li')  # a line cut off by a crash
    assert not resumed_file.exists()
    with pytest.raises(SystemExit, match="2"):  # another seed means another evaluation
        run(monkeypatch, *arguments, "--json", resumed_file, "--methods", *STATIC, "--seed", 1)
    scored_samples.clear()
    monkeypatch.setattr(command.Evaluation, "score", score_or_interrupt)
    run(monkeypatch, *arguments, "--json", resumed_file, "--methods", *STATIC)
    assert scored_samples == [2]
    assert resumed_file.read_text() == whole_file.read_text()


def test_bad_input_is_reported_in_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    for options, message in (
        (["--prompts", tmp_path / "none"], "no prompts file at"),
        (["--density", 0.5, 2], "density"),
        (["--temp", 0], "temperature of sampling must be positive"),
        (["--tokens", 1], "--tokens must be at least 2"),
        (["--batch-size", 0], "--batch-size must be at least 1"),
        (["--limit", 0], "--limit must be at least 1"),
        (["--ablation", "margins", "--json", tmp_path / "x"], "writes no files"),
        (["--ablation", "margins"], "at one --density"),
        (["--vocabulary", 2], "share of the vocabulary"),
        (["--max-kl", -1], "bound on KL must be at least 0"),
        (["--max-kl", 1, "--methods", "glass"], "--max-kl is for the method default"),
        (["--latency", "out.jsonl"], "--latency is for plots"),
        (["--plots", "plots", "--latency", tmp_path / "none"], "there is no file at"),
        (["--plots", "plots", "--latency", tmp_path / "prompts.txt"], "glass-mlx latency"),
        (["--slice-rivals"], "is for --quantizations and --checkpoints"),
        (["--checkpoints", "./none"], "there is no model at ./none"),
        (["--prior-weight", 3], "between 0 and 1"),
        (["--methods", "glass-impact"], "no statistic 'impact'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *arguments, *options)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fidelity: error: ")
        assert message in error


@pytest.mark.parametrize("ablation", command.ABLATIONS)
def test_every_ablation_prints_a_table(arguments, monkeypatch, capsys, ablation):
    run(monkeypatch, *arguments, "--ablation", ablation, "--tokens", 90, "--density", 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert len({line.count("|") for line in lines}) == 1


def test_bounds_and_shares_of_the_vocabulary_are_scored(arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    run(
        monkeypatch, *arguments, "--json", out, "--methods", "dense", "default",
        "--max-kl", 0.6, "--density", 0.5, "--vocabulary", 0.5, 1.0,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    settings = {(r["method"], r["max_kl"], r["density"], r["vocabulary"]): r for r in lines}
    assert len(settings) == len(lines) == 6
    bound = settings["default", 0.6, None, None]
    both, ffns = (settings["default", None, 0.5, share] for share in (0.5, 1.0))
    assert (ffns["vocabulary_got"], both["vocabulary_got"]) == (1.0, 0.5)
    assert both["kl"] > ffns["kl"] > 0
    assert both["bytes_share"] < ffns["bytes_share"] < 1
    assert bound["bytes_share"] < 1
    assert "curve: what slicing costs is not known yet" in capsys.readouterr().err


def test_quantizations_are_scored_and_plotted_beside_the_methods(
    arguments, tmp_path, monkeypatch, capsys
):
    out, latency = tmp_path / "out.jsonl", tmp_path / "latency.jsonl"
    settings = {"griffin": (None, 0.5, 1.0), "default": (0.6, None, None)}
    names = ("max_kl", "density", "vocabulary")
    speeds = [
        {"method": method, "run_speedup": 1.1} | dict(zip(names, values, strict=True))
        for method, values in settings.items()
    ]
    latency.write_text("".join(json.dumps(row) + "\n" for row in speeds))
    run(
        monkeypatch, *arguments, "--json", out, "--plots", tmp_path / "plots", "--max-kl", 0.6,
        "--density", 0.5, "--methods", "dense", "default", "prompt-only-griffin",
        "--quantizations", 8, 4, 3, "mixed_3_4", "--latency", latency, "--slice-rivals",
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    results = {row["method"]: row for row in lines if row["density"] is None}
    names = ("8 bits", "4 bits", "3 bits", "mixed_3_4")
    assert {*names, *(f"default on {n}" for n in names), "default", "dense"} == {*results}
    assert 0 < results["8 bits"]["kl"] < results["4 bits"]["kl"] < results["3 bits"]["kl"]
    shares = [results[name]["run_share"] for name in ("3 bits", "mixed_3_4", "4 bits", "8 bits")]
    assert shares == sorted(shares)
    assert results["4 bits"]["bytes_share"] == 1
    assert 0.7 < results["3 bits"]["bytes_share"] < 0.9
    assert (tmp_path / "plots" / "kl_by_bytes.png").read_bytes()[:4] == b"\x89PNG"
    # Slices of a quantized model are further from the model than both, and read fewer bytes.
    for name in names:
        sliced = results[f"default on {name}"]
        assert sliced["kl"] > results[name]["kl"]
        assert sliced["run_share"] < results[name]["run_share"]
    ratio = results["default on 8 bits"]["kl"] / results["default"]["kl"]
    assert ratio == pytest.approx(1, abs=0.2)


def test_other_checkpoints_are_scored(arguments, tmp_path, monkeypatch, capsys):
    """The model itself as a checkpoint has no KL, and one of half its layers reads fewer bytes."""
    out, model = tmp_path / "out.jsonl", arguments[1]
    model = model.rename(tmp_path / "model")
    arguments = ["--model", model, *arguments[2:]]
    same, smaller = (tmp_path / name for name in ("same", "smaller"))
    shutil.copytree(model, same)
    shutil.copytree(model, smaller)
    config = json.loads((smaller / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config["layer_types"] = config["layer_types"][1:]
    (smaller / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(smaller / "model.safetensors"))
    last = f"model.layers.{config['num_hidden_layers']}."
    kept = {name: array for name, array in weights.items() if not name.startswith(last)}
    mx.save_safetensors(str(smaller / "model.safetensors"), kept)
    quantized = save_tiny_folder(tmp_path / "quantized", group_size=32, bits=4)
    checkpoints = ["--checkpoints", same, smaller, quantized, "--slice-rivals"]
    options = ["--methods", "dense", "default", "--density", 0.5, *checkpoints]
    run(monkeypatch, *arguments, *options, "--json", out)
    results = {row["method"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert results["same"]["kl"] == pytest.approx(0, abs=1e-5)
    assert results["same"]["run_share"] == 1
    assert results["default on same"]["kl"] == pytest.approx(results["default"]["kl"], rel=1e-3)
    assert results["default on same"]["run_share"] == results["default"]["run_share"]
    assert results["smaller"]["kl"] > 0.01
    assert 0.4 < results["smaller"]["run_share"] < 0.9
    assert "default on smaller" not in results
    assert 0 < results["quantized"]["kl"] < results["smaller"]["kl"]
    # Two scales of 32 bits a group of 32 weights, against two of 16 bits a group of 64.
    assert results["quantized"]["run_share"] == pytest.approx(6 / 4.5, abs=0.05)
    capsys.readouterr()
    tokenizer = json.loads((smaller / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {"ab" if n == 9 else word: n for word, n in vocabulary.items()}
    (smaller / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments, "--checkpoints", smaller)
    assert "has another tokenizer" in capsys.readouterr().err


def test_thresholds_let_their_share_of_inputs_pass(arguments, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    options = ["--density", 0.25, 0.5, 1.0, "--methods", "dense", "teal", "export", "default"]
    run(monkeypatch, *arguments, *options, "--json", out)
    results = rows(out)
    teal = [results["teal", density] for density in (0.25, 0.5, 1.0)]
    kl, shares = ([row[key] for row in teal] for key in ("kl", "run_share"))
    assert kl[0] > kl[1] > kl[2] == pytest.approx(0, abs=1e-5)
    assert shares[0] < shares[1] < shares[2] == pytest.approx(1)
    # Thresholds let through about the same share of inputs of other texts.
    model = tiny_model("llama")
    session = Session(model)
    head = session.head.bytes
    expected = 0.5 * (1 - head / session.weight_bytes)
    assert 1 - shares[1] == pytest.approx(expected, abs=0.1)
