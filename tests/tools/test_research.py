"""The scripts behind docs/experiments.md, on tiny models."""

import sys

from glass_mlx import GlassConfig, GlobalPrior, Session, load
from helpers import made_prior, save_tiny_folder

import add_curves
import compare_outside
import compare_priors
import compare_schedules
import compare_shortlists
import pytest


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
        curves = prior.curves(session.conditions(GlassConfig(down_policy=policy)))
        assert curves.density.kl[0] > 0


def test_expectations_of_the_probability_outside_are_compared(
    folder, tmp_path, monkeypatch, capsys
):
    arguments = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--tokens", 50]
    run(monkeypatch, compare_outside, *arguments, "--share", 0.5, "--factor", 0.2)
    _, _, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    kl = {row[2].strip(): float(row[4]) for row in rows}
    assert kl["the truth"] < kl["the mean"]
    assert kl["the truth"] < kl["0.2"]
