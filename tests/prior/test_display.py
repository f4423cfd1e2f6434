"""Descriptions and pictures of priors."""

import sys
from dataclasses import replace

from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.display import describe, draw
from helpers import made_prior

import matplotlib.image
import numpy as np
import pytest

ABOUT = {
    "model": "tiny",
    "recipes": [
        {"recipe": "corpus", "file": "a.txt", "weight": 2.0, "tokens": 5, "sequences": 1},
    ],
    "tokens": 5,
    "settings": {"seed": 3, "length": 9},
    "versions": {"mlx": "1"},
    "stability": {"activation": {"spearman": {}, "jaccard 0.5": {}}},
}


def test_a_description_lists_the_layers_in_order():
    prior = made_prior(tiny_model("llama", num_hidden_layers=12, layer_types=None))
    paths = [*prior.scores["activation"]]
    about = ABOUT | {"stability": {"activation": {"spearman": dict.fromkeys(paths, 0.25)}}}
    shuffled = {"activation": dict(sorted(prior.scores["activation"].items()))}
    lines = describe(replace(prior, about=about, scores=shuffled)).splitlines()
    assert "recipe      corpus a.txt, weight 2.0: 5 tokens in 1 sequences" in lines
    assert "settings    seed 3, length 9" in lines
    assert [line.split()[0] for line in lines[-13:]] == [*paths, "mean"]
    assert lines[-1].split() == ["mean", "0.250"]


def test_missing_facts_are_left_out():
    assert "model       ?" in describe(replace(made_prior(tiny_model("llama")), about={}))


def test_the_picture_has_a_panel_for_each_statistic(tmp_path):
    prior = made_prior(tiny_model("llama"))
    draw(prior, tmp_path / "one.png")
    zero = {path: np.zeros_like(values) for path, values in prior.scores["activation"].items()}
    draw(replace(prior, scores=prior.scores | {"impact": zero}), tmp_path / "two.png")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] > one.shape[0]
    assert one[..., :3].std() > 0.05


def test_drawing_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'glass-mlx\[plots\]'"):
        draw(made_prior(tiny_model("llama")), tmp_path / "prior.png")
    assert not list(tmp_path.iterdir())
