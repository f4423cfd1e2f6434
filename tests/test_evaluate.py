"""The evaluate command, on tasks of this test's own, without a network."""

import json
import math
from functools import partial
from types import SimpleNamespace

from glass_mlx import load
from glass_mlx.calibration.first_use import make_selector
from glass_mlx.config import GlassConfig
from glass_mlx.evaluate import find_tasks, main, setup_arg_parser
from glass_mlx.models.architectures import tiny_model
from glass_mlx.session import Session
from helpers import prior_with_curves, save_tiny_folder
from test_measurements import flags_of

import mlx.core as mx
import pytest

pytest.importorskip("lm_eval")
from glass_mlx import harness

import mlx_lm.evaluate  # needs lm_eval

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""

WRITE = """
task: writing
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["龥"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
"""

ROLLING = """
task: reading
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_folder(tmp_path_factory.mktemp("evaluated") / "tiny")
    prior_with_curves(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    return folder


@pytest.fixture
def tasks(tmp_path):
    """Write the tasks' files; return their folder."""
    data, letters = tmp_path / "data.jsonl", "丁七丄丅丆万丈三上下丌不与丏丐丑丒专且丕世丗丘丙"
    records = [
        {
            "question": letters[n : n + 8] * 4,
            "choices": [letters[m : m + 3] for m in (n, n + 4, n + 9)],
            "answer": n % 3,
        }
        for n in range(12)
    ]
    data.write_text("\n".join(map(json.dumps, records)))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


@pytest.fixture
def evaluate(run_command, folder, tasks, monkeypatch):
    """Return a function that runs the command on a task and returns its results."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))

    def evaluate(task, *flags):
        out = tasks / "out"
        arguments = ("--tasks", tasks / f"{task}.yaml", "--output-dir", out, *flags)
        code, text, err = run_command(main, "--model", folder, *arguments)
        assert code == 0, err
        (file,) = out.iterdir()
        results = json.loads(file.read_text())
        assert json.loads(text.split("Results:\n")[1]) == results
        file.unlink()
        (values,) = results.values()
        return values

    return evaluate


def test_every_flag_of_mlx_lm_is_accepted(monkeypatch):
    ours = {*setup_arg_parser()._option_string_actions}
    flags = flags_of(mlx_lm.evaluate.main, monkeypatch)
    assert "--fewshot-as-multiturn" in flags
    assert flags <= ours


def test_choices_are_scored_dense_and_sliced(evaluate, folder, tasks):
    dense = evaluate("choice", "--dense")
    assert "flips" not in dense
    assert dense["acc,none"] == expected_accuracy(folder, tasks)
    whole = evaluate("choice", "--density", 1)
    assert whole["acc,none"] == whole["dense"]["acc,none"] == dense["acc,none"]
    assert whole["flips"]["acc"] == {"questions": 12, "flips": 0.0, "lost": 0, "gained": 0}
    half = evaluate("choice", "--density", 0.0625, "--no-prior")
    flips = half["flips"]["acc"]
    assert flips["flips"] == (flips["lost"] + flips["gained"]) / 12 > 0
    gained = (flips["gained"] - flips["lost"]) / 12
    assert half["acc,none"] - dense["acc,none"] == pytest.approx(gained)
    assert "dense" not in evaluate("choice", "--density", 0.5, "--sliced-only")


def expected_accuracy(folder, tasks):
    """Return the share of questions whose answer is the most likely of the choices."""
    model, tokenizer = load(str(folder))
    right = []
    for line in (tasks / "data.jsonl").read_text().splitlines():
        record, scores = json.loads(line), []
        before = tokenizer.encode(record["question"])
        for choice in record["choices"]:
            tokens = mx.array([*before, *tokenizer.encode(choice)])
            logits = model(tokens[None, :-1])[0]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            taken = mx.take_along_axis(logprobs, tokens[1:, None], axis=-1)
            scores.append(taken[len(before) - 1 :].sum().item())
        right.append(scores.index(max(scores)) == record["answer"])
    return sum(right) / len(right)


def test_texts_are_generated_by_the_engine(evaluate):
    whole = evaluate("write", "--density", 1)
    assert whole["exact_match,none"] == whole["dense"]["exact_match,none"]
    assert whole["flips"]["exact_match"]["flips"] == 0
    assert "exact_match,none" in evaluate("write", "--density", 0.5, "--limit", 2)


def test_running_texts_are_scored(evaluate):
    whole = evaluate("rolling", "--density", 1)
    perplexity = whole["word_perplexity,none"]
    assert perplexity == pytest.approx(whole["dense"]["word_perplexity,none"])
    half = evaluate("rolling", "--density", 0.25)
    assert half["word_perplexity,none"] != pytest.approx(perplexity, rel=1e-6)
    assert math.isfinite(half["word_perplexity,none"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such_task"], "the tasks no_such_task cannot be run"),
        (["--tasks", "missing.yaml"], "there is no task at missing.yaml"),
        (["--tasks", "EMPTY"], "has no line such as task: NAME"),
        (["--tasks", "a", "--dense", "--sliced-only"], "give either --dense or --sliced-only"),
        (["--tasks", "a", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "a", "--release-dense"], "--release-dense is of no use here"),
        (["--tasks", "a", "--density", "2"], "the density must be above 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(run_command, folder, tmp_path, flags, message):
    (tmp_path / "empty.yaml").write_text("group: a\n")
    flags = [flag.replace("EMPTY", str(tmp_path / "empty.yaml")) for flag in flags]
    code, out, err = run_command(main, "--model", folder, *flags)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("glass-mlx: error: ")
    assert message in last


def test_without_the_extra_the_command_says_what_to_install(run_command, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "glass_mlx.harness", None)
    run = partial(run_command, main, "--model", folder, "--tasks", "a")
    code, _, err = run()
    assert code == 2
    assert "pip install 'glass-mlx[evaluate]'" in err


def test_a_task_is_found_by_its_file(tasks):
    assert find_tasks([str(tasks / "choice.yaml"), "mmlu"]) == (
        ["letters", "mmlu"],
        [str(tasks.resolve())],
    )


@pytest.fixture
def lm(folder):
    """Return what the harness evaluates, with slices of few neurons."""
    model, tokenizer = load(str(folder))
    session = Session(model)
    selector = make_selector(session, tokenizer, None, GlassConfig(density=0.0625))
    return harness.GlassLM(session, tokenizer, selector)


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_the_dense_model_scores_the_first_token_of_a_choice(lm):
    """The engine generates the first token densely, and then slices."""
    context = "丁七丄丅丆万丈三"
    pairs = requests((context, "上"), (context, "上下丌"))
    one, several = lm.loglikelihood(pairs)
    lm.is_dense = True
    dense = lm.loglikelihood(pairs)
    assert one == dense[0]
    assert several[0] != pytest.approx(dense[1][0], rel=1e-6)


def test_a_shared_context_is_read_once(lm, monkeypatch):
    read, original = [], harness.read_prompt

    def record(session, tokens, cache):
        read.append(tokens)
        original(session, tokens, cache)

    monkeypatch.setattr(harness, "read_prompt", record)
    contexts, choices = ("丁七丄丅丆万丈三", "丈三上下丌不与丏"), ("上下丌", "丁七", "专且丕世")
    pairs = [(context, choice) for context in contexts for choice in choices]
    scores = lm.loglikelihood(requests(*pairs))
    assert len(read) == 2
    for pair, score in zip(pairs, scores, strict=True):
        lm._latest_context = None
        assert lm.loglikelihood(requests(pair)) == [score]
    assert len(read) == 8
