"""The commands benchmark and perplexity, on a tiny random model."""

import argparse
import json
import math
import re
from functools import partial

from glass_mlx import benchmark, load, perplexity
from glass_mlx.models.architectures import tiny_model
from helpers import prior_with_curves, save_tiny_folder

import mlx.core as mx
import mlx_lm.perplexity
import numpy as np
import pytest
from mlx_lm.benchmark import setup_arg_parser as mlx_lm_benchmark_parser
from mlx_lm.perplexity import eval_ppl


@pytest.fixture
def folder(tmp_path):
    folder = save_tiny_folder(tmp_path / "tiny")
    prior_with_curves(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    return folder


@pytest.fixture
def text(tmp_path):
    """Return a text of 600 random tokens."""
    letters = np.random.default_rng(0).integers(2, 256, 600)
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(0x4E00 + letter) for letter in letters))
    return file


def flags_of(main, monkeypatch):
    """Return the flags of a command of mlx-lm, whose parser is made in its main function."""

    class ParserError(Exception):
        pass

    def show(parser, *_):
        raise ParserError({*parser._option_string_actions})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", show)
    with pytest.raises(ParserError) as flags:
        main()
    return flags.value.args[0]


def test_every_flag_of_mlx_lm_is_accepted(monkeypatch):
    ours = {*benchmark.setup_arg_parser()._option_string_actions}
    assert {*mlx_lm_benchmark_parser()._option_string_actions} <= ours
    ours = {*perplexity.setup_arg_parser()._option_string_actions}
    flags = flags_of(mlx_lm.perplexity.main, monkeypatch)
    assert "--sequence-length" in flags
    assert flags <= ours


def test_the_benchmark_times_both_models_in_turn(run_command, folder):
    arguments = ("--model", folder, "-p", 8, "-g", 40, "-n", 2, "--density", 0.5)
    code, out, err = run_command(benchmark.main, *arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Timing with prompt_tokens=8, generation_tokens=40, batch_size=1."
    names = [re.match(r"(Trial \d, \w+|Averages, \w+|Sliced over dense):", x)[1] for x in lines[1:]]
    assert names == [
        *("Trial 1, dense", "Trial 1, sliced", "Trial 2, dense", "Trial 2, sliced"),
        *("Averages, dense", "Averages, sliced", "Sliced over dense"),
    ]
    assert "density=0.500, vocabulary=1.000, bytes_per_token=0.7" in lines[-1]
    _, out, _ = run_command(benchmark.main, *arguments[:-2], "--dense")
    assert "sliced" not in out


def test_the_dense_perplexity_is_that_of_mlx_lm(run_command, folder, text):
    arguments = ("--model", folder, "--data-path", text, "--sequence-length", 100)
    code, out, _ = run_command(perplexity.main, *arguments, "--dense")
    assert code == 0
    model, tokenizer = load(str(folder))
    tokens = tokenizer.encode(text.read_text())
    samples = mx.array(tokens[: len(tokens) // 100 * 100]).reshape(-1, 100)
    found = float(re.search(r"Dense perplexity: ([\d.]+) ±", out)[1])
    # The second token of a sample, which only one token precedes, is not scored here.
    logits = model(samples[:, :-1])
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    losses = -mx.take_along_axis(logprobs, samples[:, 1:, None], axis=-1)[:, 1:]
    assert found == pytest.approx(math.exp(losses.mean().item()), rel=1e-3)
    assert found == pytest.approx(eval_ppl(model, samples)[0], rel=0.05)
    assert "Samples: 6 of 100 tokens" in out
    assert "Sliced" not in out


def test_the_sliced_perplexity_comes_with_its_divergence(run_command, folder, text):
    run = partial(run_command, perplexity.main, "--model", folder, "--data-path", text)
    run = partial(run, "--sequence-length", 100, "--num-samples", 3)
    code, out, _ = run("--density", 0.5)
    assert code == 0
    kl = float(re.search(r"KL from the dense model: ([\d.]+) ±", out)[1])
    assert kl > 0.001
    share = float(re.search(r"read: ([\d.]+) %", out)[1])
    assert 70 < share < 95
    _, whole, _ = run("--density", 1)
    assert "KL from the dense model: 0.0000" in whole
    assert "Same most likely token: 100.00 %" in whole
    dense, sliced = re.findall(r"perplexity: ([\d.]+)", whole)
    assert dense == sliced


def test_samples_come_from_jsonl_too(run_command, folder, tmp_path):
    file = tmp_path / "data.jsonl"
    records = [{"text": "丁七丄" * 20}, {"messages": [{"role": "user", "content": "丂" * 50}]}]
    file.write_text("\n".join(map(json.dumps, records)))
    arguments = ("--model", folder, "--data-path", file, "--sequence-length", 40)
    code, out, _ = run_command(perplexity.main, *arguments, "--dense")
    assert code == 0
    assert "Samples: 2 of 40 tokens" in out


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (benchmark, ["--batch-size", "2"], "--batch-size must be 1: slices belong to one text"),
        (benchmark, ["--pipeline"], "--pipeline cannot be combined with slicing"),
        (benchmark, ["--release-dense"], "--release-dense would reload the model"),
        (benchmark, ["-p", "1"], "--prompt-tokens must be at least 2"),
        (benchmark, ["-n", "0"], "--num-trials must be at least 1"),
        (benchmark, ["--density", "2"], "the density must be above 0"),
        (benchmark, ["-qa"], "activations"),
        (perplexity, ["--sequence-length", "3"], "--sequence-length must be at least 4"),
        (perplexity, ["--num-samples", "0"], "--num-samples must be at least 1, or -1"),
        (perplexity, ["--seed", "-1"], "the seed must be from 0"),
        (perplexity, ["--release-dense"], "--release-dense is of no use here"),
        (perplexity, ["--data-path", "./missing"], "there is no data at ./missing"),
        (perplexity, ["--data-path", "."], "is a folder"),
        (perplexity, ["--data-path", "TEXT", "--sequence-length", "900"], "fewer than 900 tokens"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(run_command, folder, text, command, flags, message):
    flags = [flag.replace("TEXT", str(text)) for flag in flags]
    code, out, err = run_command(command.main, "--model", folder, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("glass-mlx: error: ")
    assert message in err
    assert err.count("\n") == 1
