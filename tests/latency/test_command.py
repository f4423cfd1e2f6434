"""The latency command, profiles and random models of real shapes."""

import json
from dataclasses import replace

from glass_mlx import load
from glass_mlx.latency.__main__ import main
from glass_mlx.latency.shapes import SHAPES, numbers_tokenizer, random_model, random_prior
from glass_mlx.latency.timing import Run, break_even
from glass_mlx.models import find_ffns, find_head, named_arrays, weight_bytes
from glass_mlx.prior.file import FILE_NAME
from glass_mlx.reporting.machine import busy_warning, slowdown_warning
from glass_mlx.session import Session
from helpers import made_prior, save_tiny_folder

import profile_decode
import pytest
from mlx.utils import tree_flatten


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep priors that a first use measures out of the user's cache."""
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["measure_latency", *map(str, options)])
    main()


@pytest.mark.slow
def test_every_method_gets_a_row_next_to_dense_mlx_lm(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny")
    files = [tmp_path / name for name in ("out.jsonl", "out.md", "out.png")]
    options = [*("--model", folder), *("--density", 0.5, 0.75), *("--prompt-tokens", 4, 9)]
    options += [*("--generation-tokens", 40), *("--repetitions", 2)]
    run(monkeypatch, *options, "--json", files[0], "--markdown", files[1], "--plot", files[2])
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 2 * (1 + 2 * 3)
    for row in rows:
        assert row["generation_tokens"] == 40
        assert row["machine"]["memory_gb"] > 0
        assert row["ceiling_ratio"] == pytest.approx(row["speedup"] / row["ceiling"])
        assert row["decode_tps"] > 0
        if row["method"] == "dense":
            assert (row["speedup"], row["ceiling"]) == (pytest.approx(1, rel=0.3), 1)
            assert row["break_even"] is None
        else:
            assert row["density_got"] == row["density"]
            assert row["ceiling"] >= row["run_ceiling"] > 1
            assert (row["ceiling"] > row["run_ceiling"]) == (row["method"] == "default")
            assert row["first_slicing_steps"] > 0
            assert row["renewal_steps"] > 0
            assert row["slice_s"] > 0
    printed = capsys.readouterr().out
    assert files[1].read_text() in printed + "\n"
    assert printed.count("| griffin ") == 8
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_released_weights_lower_held_memory(tmp_path, monkeypatch):
    folder, file = save_tiny_folder(tmp_path / "tiny"), tmp_path / "out.jsonl"
    options = ["--model", folder, "--density", 0.5]
    options += ["--methods", "glass", "released", "--repetitions", 2]
    run(monkeypatch, *options, "--generation-tokens", 4, "--json", file)
    dense, glass, released = (json.loads(line) for line in file.read_text().splitlines())
    assert released["held_gb"] < dense["held_gb"] < glass["held_gb"]
    assert released["bytes_per_token"] == glass["bytes_per_token"] < dense["bytes_per_token"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "dbrx"])
def test_a_profile_lists_the_parts_of_a_decode_step(tmp_path, monkeypatch, capsys, architecture):
    folder = save_tiny_folder(tmp_path / "tiny", architecture)
    model, _ = load(str(folder))
    made_prior(model).save(folder / FILE_NAME)
    monkeypatch.setattr("sys.argv", ["profile", "--model", str(folder), "--repetitions", "2"])
    profile_decode.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[3:]] == [
        f"| {part}" for part in ("whole step", "FFNs", "head", "rest", "building")
    ]
    cells = lines[4].split(" | ")
    assert cells[-1].startswith("2.00")  # half of the neurons
    size = sum(
        array.nbytes * Session(model).read_shares.get(ffn.path, 1)
        for ffn in find_ffns(model)
        for layer in ffn.layers.values()
        for _, array in named_arrays(layer)
    )
    assert float(cells[2]) == pytest.approx(size / 1e6, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repetitions", 1], "at least 2 repetitions"),
        (["--generation-tokens", 3], "4 generated"),
        (["--prompt-tokens", 1], "2 prompt tokens"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_shape_has_the_sizes_of_the_real_model():
    model = random_model("smollm2-135m", "float16", 4, 32, "affine")
    assert sum(a.size for k, a in tree_flatten(model.parameters()) if "norm" in k) == 61 * 576
    assert [ffn.width for ffn in find_ffns(model)] == [1536] * 30
    assert weight_bytes(model, find_head(model)) == pytest.approx(
        134.5e6 * 5 / 8, rel=0.01
    )  # 4 bits and scales
    prior = random_prior(model, "requantize")
    assert prior.scores["griffin"].keys() == {ffn.path for ffn in find_ffns(model)}
    assert set(SHAPES) >= {"llama-3.2-1b", "llama-3.1-8b", "qwen3-4b", "gemma-3-4b"}
    tokenizer = numbers_tokenizer(50)
    assert tokenizer.decode([3, 49]).split() == ["3", "49"]
    assert not tokenizer.eos_token_ids


def test_other_load_and_throttling_cause_warnings(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert "load 9.0 on 8 cores" in busy_warning()
    monkeypatch.setattr("os.getloadavg", lambda: (1.0, 0, 0))
    assert busy_warning() is None
    assert slowdown_warning([10.0, 9.5]) is None
    assert "20 % slower" in slowdown_warning([10.0, 8.0])


def test_from_break_even_on_every_token_comes_before_the_dense_token():
    def runs(*times):
        return [Run([], [*times], 0, 0, 0, None)]

    dense = runs(1, 2, 3, 4, 5)
    assert break_even(dense, runs(1, 3, 3.5, 3.9, 4.5)) == 4
    assert break_even(dense, runs(0.5, 3, 3.5, 3.9, 4.5)) == 4
    assert break_even(dense, runs(0.5, 1.5, 2, 2, 2)) == 1
    assert break_even(dense, runs(1, 3, 4, 5, 6)) is None


MIXTURES = {
    "qwen3-30b-a3b": {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
    "gpt-oss-20b": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_are_timed_with_some_of_their_layers(tmp_path, monkeypatch, name):
    shape, file = SHAPES[name], tmp_path / "out.jsonl"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {**shape.experts, **MIXTURES[name]}
    monkeypatch.setitem(SHAPES, name, replace(shape, **sizes, **heads, experts=experts))
    options = ["--shape", name, "--layers", 2, "--density", 0.5, "--repetitions", 2]
    run(monkeypatch, *options, "--dtype", "float32", "--generation-tokens", 24, "--json", file)
    dense, *sliced = (json.loads(line) for line in file.read_text().splitlines())
    assert len(sliced) == 3
    model = random_model(name, "float32", None, 64, "affine", layers=2)
    ffns = find_ffns(model)
    assert [ffn.shape for ffn in ffns] == [(8, 64)] * 2
    size = sum(a.nbytes for f in ffns for layer in f.layers.values() for a in layer.values())
    saved = dense["bytes_per_token"] - sliced[0]["bytes_per_token"]
    assert saved == pytest.approx(size / 4 / 2, rel=0.05)  # 2 of 8 experts, half of each
    assert all(row["slice_s"] > 0 and row["renewal_steps"] > 0 for row in sliced)
    assert dense["model"] == f"{name} (random) 2 layers"


def test_the_sizes_of_mixtures_are_those_that_were_published():
    """Qwen3-30B-A3B has 30.5 billion weights, 3.3 of them active; gpt-oss-20b 20.9 and 3.6.

    Qwen's figure counts the embedding, of which a token reads one row; that of gpt-oss does not.
    """
    for name, total, active in (("qwen3-30b-a3b", 30.5, 3.3 - 0.31), ("gpt-oss-20b", 20.9, 3.6)):
        session = Session(random_model(name, "bfloat16", None, 64, "affine", lazy=True))
        weights = sum(array.size for _, array in tree_flatten(session.model.parameters()))
        assert weights / 1e9 == pytest.approx(total, rel=0.01)
        assert session.weight_bytes / 2e9 == pytest.approx(active, rel=0.03)


def test_the_number_of_layers_is_checked(run_command):
    code, _, error = run_command(main, "--shape", "gpt-oss-20b", "--layers", 0)
    assert (code, error.count("\n")) == (2, 1)
    assert "--layers must be at least 1" in error
