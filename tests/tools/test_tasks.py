"""Tasks with right and wrong answers: questions, marks, figures and the comparison."""

import json
import sys

from glass_mlx import load
from helpers import prior_with_curves, save_tiny_folder

import compare_tasks
import make_tasks
import numpy as np
import pytest
from tasks import scorers
from tasks.figures import accuracy, changes, difference_interval, share_interval
from tasks.questions import TASKS, write_questions


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def mark(name, question, answer):
    record = {"answer": question.answer, "tests": question.tests}
    return getattr(scorers, TASKS[name].scorer)(record, [answer])


@pytest.mark.parametrize("name", TASKS)
def test_correct_answers_are_right_and_others_are_not(name):
    first, second = write_questions(name, 2, seed=3)
    assert [first, second] == write_questions(name, 2, seed=3)
    assert write_questions(name, 1, seed=4) != [first]
    assert set(mark(name, first, first.answer).values()) == {1.0}
    for wrong in ("", "nonsense {", second.answer, first.answer[: len(first.answer) // 2]):
        marks = mark(name, first, wrong)
        assert marks["right"] == 0
        assert marks["share"] < 1
    # An answer must end where the harness ends it, and not before.
    assert not any(end in first.answer for end in TASKS[name].until)


def test_results_follow_from_the_worked_examples_alone():
    """The answer is not in the prompt, except where it is to be copied."""
    for name in ("arithmetic", "numerals", "json", "code", "report"):
        for question in write_questions(name, 20, seed=0):
            assert question.answer.strip() not in question.text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (' {"a": 1, "b": [2]}', (1, 1, 1)),
        (' {"b": [2], "a": 1}', (1, 1, 1)),
        (' {"a": 1, "b": [3]}', (0, 0.5, 1)),
        (' {"a": 1, "b": [2], "c": 0}', (0, 1, 1)),
        (' {"a": 1, "b": [2}', (0, 0, 0)),
        (" [1]", (0, 0, 0)),
    ],
)
def test_json_is_marked_by_its_values(answer, expected):
    marks = scorers.mark_json({"answer": '{"a": 1, "b": [2]}'}, [answer])
    assert (marks["right"], marks["share"], marks["parses"]) == expected


def test_calculations_are_right_by_their_results():
    record = {"answer": " 2 + 3 = 5. 5 + 1 = 6. The result is 6."}
    wrong_step = scorers.mark_steps(record, [" 2 + 3 = 4. 5 + 1 = 6. The result is 6."])
    assert wrong_step == {"right": 1, "share": pytest.approx(2 / 3)}
    wrong_result = scorers.mark_steps(record, [" 2 + 3 = 5. 5 + 1 = 6. The result is 7."])
    assert wrong_result == {"right": 0, "share": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x",
        "def f(x):\n    while True: pass",
        "def f(x): return [0] * 10**10",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print(3)",
        "def f(x): return (",
    ],
)
def test_bad_code_fails_its_tests_and_nothing_else(code, monkeypatch):
    monkeypatch.setattr(scorers, "_SECONDS", 2)
    record = {"tests": ["f(1) == 2", "f(2) == 3"]}
    assert scorers.mark_code(record, [code])["right"] == 0
    assert scorers.mark_code(record, ["def f(x): return x + 1"]) == {"right": 1, "share": 1}


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    shares, differences = [], []
    for _ in range(2000):
        a = rng.random(60) < 0.9
        b = np.where(rng.random(60) < 0.1, rng.random(60) < 0.5, a)
        low, high = accuracy(a.astype(float))["accuracy_95"]
        shares.append(low <= 0.9 <= high)
        low, high = changes(a.astype(float), b.astype(float))["difference_95"]
        differences.append(low <= -0.04 <= high)
    assert 0.92 < np.mean(shares) < 0.99
    assert 0.92 < np.mean(differences) < 0.99
    assert share_interval(0, 50)[1] > 0.05
    low, high = difference_interval(0, 0, 50)
    assert low < 0 < high


def test_changes_count_lost_and_gained_questions():
    row = changes([1, 1, 1, 0], [1, 0, 0, 1])
    assert (row["lost"], row["gained"], row["flips"]) == (2, 1, 0.75)
    assert row["difference"] == -0.25
    assert row["dense_accuracy"] == 0.75


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = save_tiny_folder(tmp_path / "tiny")
    prior_with_curves(load(str(folder))[0]).save(folder / "glass_prior.safetensors")
    return folder


def test_an_interrupted_comparison_continues(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    tasks, out = tmp_path / "tasks", tmp_path / "out.jsonl"
    names = ("copying", "code")
    run(monkeypatch, make_tasks, "--output", tasks, "--count", 3, "--tasks", *names)
    paths = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".yaml")]
    assert len(paths) == 2
    arguments = ["--model", files, "--tasks", *paths, "--json", out, "--limit", 2]
    arguments += ["--density", 0.5, "--warmup", 4]
    answered = []
    original = compare_tasks.Runner.answer

    def answer_or_interrupt(self, task, config):
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(task)
        return original(self, task, config)

    monkeypatch.setattr(compare_tasks.Runner, "answer", answer_or_interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, compare_tasks, *arguments)
    assert len(out.read_text().splitlines()) == 3
    answered.clear()
    run(monkeypatch, compare_tasks, *arguments)
    assert answered == paths[1:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task"], row["setting"]) for row in rows] == [
        (name, setting)
        for name in names
        for setting in ("dense", "--density 0.5 --vocabulary 1 --warmup 4")
    ]
    for row in rows:
        assert row["questions"] == len(row["marks"]["right"]) == 2
        assert ("flips" in row) == (row["setting"] != "dense")
        assert row["answer_tokens"] > 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6
    assert "(weak)" in table[-1]
    # A changed task is answered anew.
    run(monkeypatch, make_tasks, "--output", tasks, "--count", 3, "--tasks", *names, "--seed", 1)
    answered.clear()
    monkeypatch.setattr(compare_tasks.Runner, "answer", lambda *a: answered.append(a) or rows[0])
    run(monkeypatch, compare_tasks, *arguments)
    assert len(answered) == 4


def test_the_same_model_has_no_flips(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    run(monkeypatch, make_tasks, "--output", tmp_path / "t", "--count", 2, "--tasks", "copying")
    arguments = ["--model", files, "--tasks", tmp_path / "t" / "copying.yaml"]
    run(monkeypatch, compare_tasks, *arguments, "--density", 1, "--json", tmp_path / "out.jsonl")
    dense, whole = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert whole["marks"] == dense["marks"]
    assert whole["answer_tokens"] == dense["answer_tokens"]
    assert whole["flips"] == 0


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (make_tasks, ["--output", "x", "--count", 0], "--count must be at least 1"),
        (make_tasks, ["--output", "x", "--seed", -1], "the seed must be"),
        (compare_tasks, ["--tasks", "none.yaml", "--json", "x"], "there is no task at none.yaml"),
        (compare_tasks, ["--tasks", "a", "--json", "x", "--limit", 0], "--limit must be"),
        (compare_tasks, ["--tasks", "a", "--json", "x", "--density", 2], "density must be"),
        (compare_tasks, ["--tasks", "a", "--json", "FILE"], "results of compare_tasks"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, script, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text('{"a": 1}\n')
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, *options)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "x").exists()
