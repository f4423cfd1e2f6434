"""KL of a model that is sliced once, and its report by an export."""

import json
import weakref

from glass_mlx import export, load
from glass_mlx.calibration.curves import answer_prompts
from glass_mlx.export import _SCORED, main
from glass_mlx.fidelity.prompts import Continuation, WritingSettings, continue_all, read_prompts
from glass_mlx.fidelity.static import Divergence, compare, read_texts
from glass_mlx.models import named_arrays
from glass_mlx.prior.file import FILE_NAME
from glass_mlx.session import Session
from helpers import made_prior, random_selection, save_tiny_folder

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

TEXTS = [Continuation([1, 7, 3], [5, 2, 9, 9]), Continuation([4, 4], [8, 1])]


def log_softmax(logits):
    logits = np.array(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_divergence_is_over_the_written_tokens_of_all_texts(tmp_path, architecture):
    model, _ = load(str(save_tiny_folder(tmp_path / "dense", architecture)))
    sliced = Session(model).slice(random_selection(model), "requantize")
    by_text = []
    for text in TEXTS:
        tokens = mx.array(text.prompt + text.written)[None]
        p, q = (log_softmax(m(tokens)[0, len(text.prompt) - 1 : -1]) for m in (model, sliced))
        by_text.append((np.exp(p) * (p - q)).sum(-1))
    seen = []
    result = compare(read_texts(model, TEXTS, seen.append), read_texts(sliced, TEXTS))
    assert seen == [1, 1]
    assert result.tokens == 6
    assert result.kl == pytest.approx(np.concatenate(by_text).mean(), rel=1e-3)
    assert result.kl > 0
    residuals = [each.sum() - result.kl * len(each) for each in by_text]
    assert result.standard_error == pytest.approx(
        (2 * np.square(residuals).sum()) ** 0.5 / 6, rel=0.02
    )
    alone = compare(read_texts(model, TEXTS[:1]), read_texts(sliced, TEXTS[:1]))
    assert "±" not in str(alone)
    assert str(Divergence(0.1234, 0.02, 9)) == "0.123 ± 0.020"


def test_probabilities_that_are_not_finite_are_refused():
    rows = [mx.zeros((2, 3))]
    with pytest.raises(ValueError, match="--dtype"):
        compare(rows, [mx.full((2, 3), float("nan"))])


def run_export(monkeypatch, tmp_path, *options):
    arguments = [*("--model", tmp_path / "dense"), *("--output", tmp_path / "out"), *options]
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    main()


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("has_prompts", [False, True])
def test_an_export_reports_the_divergence_of_what_it_wrote(
    tmp_path, monkeypatch, capsys, architecture, has_prompts
):
    folder = save_tiny_folder(tmp_path / "dense", architecture)
    dense, tokenizer = load(str(folder))
    made_prior(dense).save(folder / FILE_NAME)
    prompts, options = tmp_path / "prompts.txt", ["--density", 0.5]
    prompts.write_text("丁七万\n丈三上\n")
    monkeypatch.setattr("glass_mlx.calibration.curves.PROMPTS", prompts)
    if has_prompts:
        options += ["--prompts", prompts, "--tokens", 12]
        settings = WritingSettings(12, 0.7, 1)  # not the seed of the answers that select
        texts = continue_all(dense, tokenizer, read_prompts(prompts), settings)
        name = "new answers to the prompts"
    else:
        texts, name = answer_prompts(dense, tokenizer, _SCORED), "its own text"
    run_export(monkeypatch, tmp_path, *options)
    written, _ = mlx_lm.load(str(tmp_path / "out"))
    expected = compare(read_texts(dense, texts), read_texts(written, texts))
    assert expected.tokens == sum(len(text.written) for text in texts)
    line = f"KL to the dense model: {expected} nats per token ({expected.tokens} tokens of {name})"
    assert line in capsys.readouterr().out.splitlines()
    about = json.loads((tmp_path / "out" / "config.json").read_text())["glass"]
    assert about["kl"] == pytest.approx(expected.kl, abs=1e-5)
    assert about["kl_tokens"] == expected.tokens


def test_without_text_the_divergence_is_unknown(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "dense")
    made_prior(load(str(folder))[0]).save(folder / FILE_NAME)
    monkeypatch.setattr(export, "answer_prompts", lambda *arguments: [])
    run_export(monkeypatch, tmp_path, "--density", 0.5)
    assert "KL to the dense model: unknown" in capsys.readouterr().out
    assert "kl" not in json.loads((tmp_path / "out" / "config.json").read_text())["glass"]


def test_an_export_does_not_hold_both_models(tmp_path):
    folder = save_tiny_folder(tmp_path / "dense", "qwen3_moe")
    model, _ = load(str(folder))
    session = Session(model)
    layers = {f"{ffn.path}.{name}." for ffn in session.ffns for name in ffn.layers}
    references = [
        weakref.ref(array) for path, array in named_arrays(model) if path.startswith((*layers,))
    ]
    selection = random_selection(model)
    expected = session.slice(selection, "requantize")(mx.array([[1, 2, 3]]))
    sliced, divergence = export._slice_and_score(
        session, selection, TEXTS, lambda: load(str(folder), lazy=True)[0]
    )
    assert divergence.kl > 0
    assert references
    assert not any(array() is not None for array in references)
    assert mx.array_equal(sliced(mx.array([[1, 2, 3]])), expected)
