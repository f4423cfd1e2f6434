"""The protocol for contributed machines, and the table of them."""

import json

import make_machine_table
from glass_mlx import benchmark
from glass_mlx.latency import submission
from glass_mlx.latency.shapes import SHAPES, Shape
from glass_mlx.models.architectures import tiny_model
from glass_mlx.reporting import machine
from helpers import prior_with_curves, save_tiny_folder

import mlx.core as mx
import pytest

PMSET = {
    "batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=4653155)\t80%; discharging",
    "therm": "Note: No thermal warning level has been recorded\nNote: No performance warning",
}
DISPLAYS = "Apple M2 Pro:\n  Serial Number: SECRET\n  Total Number of Cores: 19\n"


@pytest.fixture
def mac(monkeypatch):
    """Answer the commands of macOS that describe a machine."""

    def output(*command):
        if command[0] == "pmset":
            return PMSET.get(command[-1], " lowpowermode         1\n")
        return DISPLAYS if command[0] == "system_profiler" else "Mac14,9"

    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(machine, "_command_output", output)


def test_a_mac_is_described_without_serial_numbers(mac):
    assert machine.describe_model() == {"macos": "15.1", "model": "Mac14,9", "gpu_cores": 19}
    assert machine.describe_power() == {
        "power": "battery",
        "battery_percent": 80,
        "low_power_mode": True,
    }
    text = str(machine.describe_model() | machine.describe_power())
    assert "SECRET" not in text
    assert "4653155" not in text


@pytest.mark.parametrize(
    ("mode", "is_low"), [("powermode 1", True), ("powermode 2", False), ("lowpowermode 0", False)]
)
def test_the_power_mode_is_found(mac, monkeypatch, mode, is_low):
    monkeypatch.setitem(PMSET, "-g", f" womp 1\n {mode}\n")
    assert machine.describe_power()["low_power_mode"] is is_low


def test_a_battery_and_low_power_mode_make_figures_doubtful():
    mains = {"power": "mains", "low_power_mode": False}
    assert machine.power_warning(mains, {"power": "unknown"}) is None
    assert "battery" in machine.power_warning(mains, {"power": "battery"})
    assert "low-power mode" in machine.power_warning(mains | {"low_power_mode": True})


def test_a_command_that_hangs_says_nothing(monkeypatch):
    def hang(command, **options):
        raise machine.subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(machine.subprocess, "run", hang)
    assert machine._command_output("pmset", "-g") == ""


def test_a_throttled_mac_says_so(mac, monkeypatch):
    limits = "CPU_Scheduler_Limit \t= 100\nCPU_Available_CPUs \t= 8\nCPU_Speed_Limit \t= 61"
    monkeypatch.setitem(PMSET, "therm", limits)
    assert "CPU_Speed_Limit 61" in machine.describe_power()["thermal"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "SHAPES", ("llama-3.2-1b", "llama-3.2-3b"))
    small = Shape("llama", 2, 64, 128, 4, 2, 16, 256, True)
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", small)
    monkeypatch.setattr(submission, "_GENERATION_TOKENS", 70)
    monkeypatch.setattr(submission, "_MIN_TOKENS", 60)
    folder = save_tiny_folder(tmp_path / "tiny")
    prior_with_curves(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    # The other shape keeps its size, which is too much for this memory.
    monkeypatch.setattr(submission, "usable_memory", lambda: 10**9)
    return folder


def test_the_protocol_measures_each_model_and_says_what_it_left_out(
    run_command, folder, tmp_path, monkeypatch
):
    file = tmp_path / "machine.json"
    code, out, err = run_command(benchmark.main, "--model", folder, "--submit-file", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert submission.is_submission(found)
    real, small, large = found["results"]
    assert real["model"] == "tiny"
    assert "need too much memory" in large["left_out"]
    for result in (real, small):
        dense, sliced = result["rows"]
        assert (dense["method"], sliced["method"]) == ("dense", "default")
        assert dense["generation_tokens"] == sliced["generation_tokens"] == 70
        assert sliced["bytes_per_token"] <= dense["bytes_per_token"]
        assert len(result["speedups"]) == dense["repetitions"] >= 2
        assert all(result["same_text"])
        assert result["weights"] == "float32"
        is_steady = max(result["speedups"]) <= 1.1 * min(result["speedups"])
        disturbed = f"{result['model']}: rounds have speed-ups"
        assert is_steady != any(disturbed in warning for warning in found["warnings"])
    assert str(tmp_path) not in file.read_text()
    assert "llama-3.2-3b (random): left out" in out
    assert "docs/data/machines" in out

    # The table has a row for each model that was measured.
    machines, readme = tmp_path / "machines", tmp_path / "README.md"
    machines.mkdir()
    (machines / "a.json").write_text(file.read_text())
    readme.write_text("before\n<!-- machines -->\nold\n<!-- end of machines -->\nafter\n")
    table = ["--machines", machines, "--readme", readme]
    for _ in range(2):
        assert run_command(make_machine_table.main, *table)[0] == 0
    first, start, _, _, *rows, end, last = readme.read_text().splitlines()
    assert (first, start) == ("before", "<!-- machines -->")
    assert (end, last) == ("<!-- end of machines -->", "after")
    assert len(rows) == 2
    assert f"| {real['rows'][0]['total_tps']:.1f} |" in rows[0]
    (machines / "b.json").write_text("{}")
    code, _, err = run_command(make_machine_table.main, *table)
    assert (code, err.count("\n")) == (2, 1)
    assert "b.json was not written by glass-mlx benchmark" in err


def test_what_was_measured_before_a_failure_is_kept(run_command, folder, tmp_path, monkeypatch):
    def measure(args, seconds, warnings):
        if args.shape == "llama-3.2-3b":
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        if args.shape is None:
            raise KeyboardInterrupt
        return {"left_out": "small"}

    monkeypatch.setattr(submission, "_measure_model", measure)
    file = tmp_path / "machine.json"
    run_command(benchmark.main, "--model", folder, "--submit-file", file)
    small, large = json.loads(file.read_text())["results"]
    assert small["left_out"] == "small"
    assert "Insufficient Memory" in large["left_out"]


def test_a_model_that_is_too_slow_for_the_time_is_left_out(folder):
    model = submission._arguments(str(folder), None)
    assert "too slow for the time" in submission._measure_model(model, 1e-3, [])["left_out"]


def test_weights_have_four_bits_on_a_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    shape, real = submission._arguments(None, "llama-3.2-1b"), submission._arguments(None, None)
    assert (shape.bits, shape.dequantize, real.bits) == (4, False, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--density", "0.5"], "leave out --density"),
        (["-p", "8"], "leave out --prompt-tokens"),
        (["--dequantize"], "leave out --dequantize"),
        (["--submit-minutes", "0"], "--submit-minutes must be positive"),
    ],
)
def test_the_protocol_has_no_other_flags(run_command, tmp_path, flags, message):
    file = tmp_path / "machine.json"
    code, out, err = run_command(benchmark.main, "--submit-file", file, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert not file.exists()
