"""Mutated files are refused or load right, and the tool that finds out notices when they do not."""

import os
import signal
import time

from glass_mlx.errors import one_line
from glass_mlx.prior.lookup import NoPriorError

import fuzz_files
import mlx.core as mx
import numpy as np
import pytest
from fuzzing import checks
from fuzzing.cases import FORMATS, Case, case_format, case_numbers, make_case, seed_files
from fuzzing.checks import FAILED, LOADED, REFUSED, Outcome, judge, message_defect
from fuzzing.mutation import Expected, Mutation
from fuzzing.watch import Lost, watched

CASES = 210
# Far more than a case may take, because tests may run on a busy machine.
LIMIT = 60.0


@pytest.mark.slow
def test_mutated_files_are_refused_or_load_right():
    outcomes = fuzz_files.fuzz(case_numbers([*FORMATS], CASES), seed=0, jobs=2, limit=LIMIT)
    assert len(outcomes) == CASES
    failures = [outcome for outcome in outcomes if outcome.status == FAILED]
    assert not failures, "\n".join(f"{f.number} {f.what}: {f.detail}" for f in failures)
    assert {(o.format, o.status) for o in outcomes} == {
        (kind, status) for kind in FORMATS for status in (REFUSED, LOADED)
    }


def test_a_case_depends_on_its_number_and_the_seed_alone():
    for number in range(4 * len(FORMATS)):
        case = make_case(0, number)
        assert make_case(0, number) == case
        assert case.format == case_format(number)
    texts = {make_case(0, number).mutation.what for number in range(0, 600, 6)}
    assert len(texts) > 80
    assert {make_case(1, number).mutation.what for number in range(0, 600, 6)} != texts


def test_formats_take_turns():
    assert [case_format(number) for number in case_numbers(["prior", "config"], 4)] == [
        *("prior", "config", "prior", "config")
    ]


# --- Outcomes -------------------------------------------------------------------------------------


def outcome_of(monkeypatch, expected, *results):
    """Return the outcome of a case whose files give one result after the other when opened.

    Args:
        monkeypatch: replaces what opens a prior.
        expected: what the mutation allows.
        *results: numbers or errors; the last one is given again.
    """
    left = list(results)

    def open_prior(folder, seed):
        result = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(result, Exception):
            raise result
        return [np.array([result], np.float32)]

    monkeypatch.setitem(checks.OPENERS, "prior", open_prior)
    monkeypatch.setattr(checks, "seed_output", lambda kind, name: [np.array([1.0], np.float32)])
    (name,) = seed_files("prior")
    case = Case(1, "prior", name, seed_files("prior")[name], Mutation("a change", expected))
    return judge(case)


REFUSAL = ValueError("the prior is damaged; build it again")


@pytest.mark.parametrize(
    ("expected", "results", "status"),
    [
        (Expected.SAME, (1.0,), LOADED),
        (Expected.SAME, (2.0,), FAILED),
        (Expected.SAME, (REFUSAL,), FAILED),
        (Expected.SAME_IF_LOADED, (REFUSAL,), REFUSED),
        (Expected.SAME_IF_LOADED, (1.0,), LOADED),
        (Expected.SAME_IF_LOADED, (2.0,), FAILED),
        (Expected.REFUSED, (REFUSAL,), REFUSED),
        (Expected.REFUSED, (1.0,), FAILED),
        (Expected.FINITE, (2.0,), LOADED),
        (Expected.FINITE, (np.inf,), FAILED),
        (Expected.FINITE, (np.nan,), FAILED),
        (Expected.ANY, (np.nan,), LOADED),
        (Expected.ANY, (2.0, 3.0), FAILED),
        (Expected.ANY, (2.0, REFUSAL), FAILED),
        (Expected.ANY, (REFUSAL, ValueError("it is damaged in another way")), FAILED),
        (Expected.ANY, (KeyError("a"),), FAILED),
        (Expected.ANY, (ValueError("list index out of range"),), FAILED),
        (Expected.ANY, (MemoryError(),), FAILED),
    ],
)
def test_each_expectation_allows_what_it_says(monkeypatch, expected, results, status):
    assert outcome_of(monkeypatch, expected, *results).status == status


def test_more_memory_than_the_size_justifies_is_a_failure(monkeypatch):
    (name,) = seed_files("prior")
    files = seed_files("prior")[name]
    limit = checks.MAX_BYTES + checks.MAX_SIZES * sum(map(len, files.values()))

    def open_prior(folder, seed):
        np.ones(sizes.pop(0), np.uint8)
        raise REFUSAL

    monkeypatch.setattr(checks, "seed_output", lambda kind, name: [])
    monkeypatch.setitem(checks.OPENERS, "prior", open_prior)
    case = Case(1, "prior", name, files, Mutation("a change", Expected.ANY))
    sizes = [limit // 2, 1]
    assert judge(case).status == REFUSED
    sizes = [2 * limit + (256 << 20), 1]  # memory that is freed meanwhile hides some
    outcome = judge(case)
    assert outcome.status == FAILED
    assert "MiB of memory" in outcome.detail


@pytest.mark.parametrize(
    "error",
    [
        ValueError("/tmp/x.gguf cannot be used: the metadata has no llama.block_count"),
        FileNotFoundError("there is no prior at /tmp/prior.safetensors"),
        NoPriorError("there is no prior for this model"),
        OSError(2, "No such file or directory", "/tmp/x"),
        ValueError("/tmp/x.safetensors is not a complete safetensors file (invalid header length)"),
    ],
)
def test_messages_for_users_pass(error):
    assert message_defect(error) is None


def error_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("there is no error")


@pytest.mark.parametrize(
    "error",
    [
        error_of(lambda: [][0]),
        error_of(lambda: None.x),
        error_of(lambda: {}["key"]),
        error_of(lambda: {[]: 1}),
        error_of(lambda: int("x")),
        error_of(lambda: np.ones(3).reshape(2)),
        error_of(lambda: np.ones(3) + np.ones(2)),
        error_of(b"\xff".decode),
        error_of(mx.zeros((2, 3)).reshape, 4),
        error_of(mx.matmul, mx.zeros((2, 3)), mx.zeros((2, 3))),
    ],
    ids=one_line,
)
def test_errors_of_programs_do_not_pass(error):
    assert message_defect(error)
    assert message_defect(ValueError(f"the file cannot be used: {error}"))


@pytest.mark.parametrize("text", ["", " \n", "two\nlines", "a \0 byte", "x" * 2000])
def test_messages_that_cannot_be_read_do_not_pass(text):
    assert message_defect(ValueError(text))


# --- Processes ------------------------------------------------------------------------------------


def run_watched(numbers, run, limit=LIMIT):
    return dict(watched(numbers, run, int, jobs=2, limit=limit))


def test_a_process_that_hangs_is_ended():
    results = run_watched([0, 600, 0], time.sleep, limit=1.0)
    assert results == {0: None, 600: Lost("hangs for more than 1 seconds")}


def test_a_process_that_crashes_is_replaced():
    assert run_watched([3, 4, 5], os._exit) == {n: Lost(f"exits with {n}") for n in (3, 4, 5)}
    crash = run_watched([signal.SIGKILL, 0], signal.raise_signal)
    assert crash[signal.SIGKILL] == Lost(f"crashes with signal {signal.SIGKILL:d}")


def test_a_process_that_cannot_start_is_an_error():
    with pytest.raises(RuntimeError, match="cannot start"):
        list(watched([1], time.sleep, os.abort, jobs=1, limit=LIMIT))


# --- The command ----------------------------------------------------------------------------------


def test_the_command_lists_failures_and_exits_with_1(run_command, monkeypatch):
    outcomes = [
        Outcome(0, "gguf", REFUSED, "a change", "it is damaged"),
        Outcome(6, "gguf", LOADED, "a change"),
        Outcome(7, "prior", FAILED, "another change", "KeyError: 'a'"),
    ]
    monkeypatch.setattr(fuzz_files, "fuzz", lambda *options: outcomes)
    code, out, _ = run_command(fuzz_files.main, "--cases", 3)
    assert code == 1
    assert "7 prior failed: KeyError: 'a'\n    another change\n" in out
    rows = [[*map(str.strip, line.strip("|").split("|"))] for line in out.splitlines()[-2:]]
    assert rows == [["gguf", "2", "1", "1", "0"], ["prior", "1", "0", "0", "1"]]
    monkeypatch.setattr(fuzz_files, "fuzz", lambda *options: outcomes[:2])
    assert run_command(fuzz_files.main, "--cases", 2)[0] == 0


def test_one_case_can_be_opened_again_and_its_files_kept(run_command, monkeypatch, tmp_path):
    numbers = []
    monkeypatch.setattr(fuzz_files, "fuzz", lambda n, *options: numbers.extend(n) or [])
    assert run_command(fuzz_files.main, "--case", 13, "--keep", tmp_path / "case")[0] == 0
    assert numbers == [13]
    kept = {file.name: file.read_bytes() for file in (tmp_path / "case").iterdir()}
    assert kept == make_case(0, 13).files
    code, _, err = run_command(fuzz_files.main, "--keep", tmp_path / "case")
    assert code == 2
    assert "--keep needs --case" in err
