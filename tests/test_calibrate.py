"""The command that measures, shows and publishes priors."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from glass_mlx import resolve_prior
from glass_mlx.calibrate import main
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.file import FILE_NAME
from helpers import made_prior, save_tiny_folder

import pytest

TOOL = Path(__file__).parents[1] / "tools/build_priors.py"

# Run the command, but stop its process after every checkpoint until SIGCONT arrives.
STOPPING_PROGRAM = """
import os, signal
from glass_mlx.calibration import building
from glass_mlx.calibrate import main

save_checkpoint = building.save_checkpoint

def save_and_stop(*arguments):
    save_checkpoint(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)

building.save_checkpoint = save_and_stop
main()
"""


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "tiny")


def start(folder, output, *program, **options):
    arguments = ["--model", str(folder), "--output", str(output), "--recipe", "bos"]
    arguments += ["--tokens", "4000", "--length", "40", "--batch-size", "4", "--curve-texts", "1"]
    return subprocess.Popen(
        [sys.executable, *(program or [str(TOOL)]), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def start_and_wait_for_checkpoint(folder, output):
    process = start(folder, output, "-c", STOPPING_PROGRAM)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process


@pytest.mark.slow
def test_a_run_killed_or_out_of_disk_space_resumes_to_the_same_file(folder, tmp_path):
    whole_file, resumed_file = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    complete_run = start(folder, whole_file)
    out, err = complete_run.communicate()
    assert complete_run.returncode == 0, err
    assert out.startswith(f"Wrote {whole_file}: ")
    assert "Peak memory: " in out

    partial = tmp_path / "parts.safetensors.partial"
    killed_run = start_and_wait_for_checkpoint(folder, resumed_file)
    assert partial.exists()
    second_run = start(folder, resumed_file)
    assert "another run is writing" in second_run.communicate()[1]
    assert second_run.returncode == 2
    killed_run.send_signal(signal.SIGKILL)
    killed_run.communicate()
    assert not resumed_file.exists()
    (tmp_path / ".parts.safetensors.partial.glass-x").mkdir()  # as if killed while writing
    (tmp_path / ".parts.safetensors.mine").mkdir()

    interrupted_run = start_and_wait_for_checkpoint(folder, resumed_file)
    interrupted_run.send_signal(signal.SIGINT)
    interrupted_run.send_signal(signal.SIGCONT)
    _, err = interrupted_run.communicate()
    assert interrupted_run.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    full_disk_run = start(folder, resumed_file, preexec_fn=full_disk)
    _, err = full_disk_run.communicate()
    assert full_disk_run.returncode == 2
    assert err.splitlines()[-1].startswith("calibrate: error: ")
    assert "cannot be written" in err
    assert "Traceback" not in err

    complete_run = start(folder, resumed_file)
    _, err = complete_run.communicate()
    assert complete_run.returncode == 0, err
    assert resumed_file.read_bytes() == whole_file.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {
        *("tiny", whole_file.name, resumed_file.name, ".parts.safetensors.mine")
    }


@pytest.fixture
def run(run_command):
    """Return a function that runs the command and returns its exit code, stdout and last error."""

    def run(*arguments):
        code, out, err = run_command(main, *arguments, program="build_priors.py")
        return code, out, err.splitlines()[-1] if err else ""

    return run


def test_the_command_writes_and_shows_a_prior_that_the_model_finds(
    run, folder, tmp_path, monkeypatch
):
    output = folder / FILE_NAME
    arguments = ["--model", folder, "--output", output, "--tokens", 90, "--length", 24]
    arguments += ["--recipe", "bos=2", "--statistic", "griffin", "--statistic", "impact"]
    code, out, _ = run(*arguments)
    assert code == 0
    prior = resolve_prior(tiny_model("llama"), folder=folder)
    assert out.startswith(f"Wrote {output}: {prior.about['tokens']} tokens in ")
    assert prior.about["model"] == folder.name
    assert prior.scores.keys() == {"griffin", "impact"}
    assert not list(folder.glob("*.partial")) + list(folder.glob("*.lock"))

    monkeypatch.chdir(tmp_path)
    code, out, _ = run("--show", output)
    assert code == 0
    for part in (folder.name, "bos, weight 2.0", "griffin, impact", "stability of impact", "mean"):
        assert part in out
    picture = tmp_path / "glass_prior.png"
    assert str(picture.name) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 0], "must be positive"),
        (["--sequences", 0], "must be positive"),
        (["--length", -1], "must be positive"),
        (["--length", 16], "the length must be above 16"),
        (["--batch-size", 0], "must be positive"),
        (["--temp", 0], "must be positive"),
        (["--temp", "nan"], "must be positive"),
        (["--seed", -1], "the seed must be from 0 to"),
        (["--until-stable", 2], "--until-stable must be between 0 and 1"),
        (["--recipe", "poem"], "'poem' is not a recipe"),
        (["--recipe", "corpus"], "'corpus' is not a recipe"),
        (["--recipe", "bos=-1"], "must be positive"),
        (["--recipe", "chat"], "no chat template; use the recipe bos"),
        (["--recipe", "corpus:missing.txt"], "there is no corpus at missing.txt"),
        (["--statistic", "variance"], "invalid choice"),
        (["--model", "missing.gguf"], "there is no model at missing.gguf"),
        (["--show", "x"], "not allowed with argument"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(run, folder, tmp_path, arguments, message):
    required = ["--model", folder, "--output", tmp_path / "out"]
    code, out, err = run(*required, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("calibrate: error: ")
    assert message in err
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_as_output_is_refused_before_measuring(run, folder):
    code, _, err = run("--model", folder, "--output", folder)
    assert code == 2
    assert err.endswith("is a folder; give the name of a file")


def test_a_damaged_prior_is_not_shown(run, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    code, out, err = run("--show", tmp_path / "x.safetensors")
    assert (code, out) == (2, "")
    assert "not a complete safetensors file" in err


def test_the_module_runs_the_command(folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "glass_mlx.calibrate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert "--recipe" in result.stdout
    assert json.dumps(result.stderr) == '""'


def test_show_describes_a_prior_before_it_needs_matplotlib(run, tmp_path, monkeypatch):
    made_prior(tiny_model("llama")).save(tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("--show", tmp_path / "x.safetensors")
    assert code == 2
    assert "model       tiny" in out
    assert err.endswith("drawing needs matplotlib; install it with: pip install 'glass-mlx[plots]'")
