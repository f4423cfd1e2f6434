"""The generate command, in this process and in a subprocess."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from glass_mlx.generate import __main__ as generate_command
from glass_mlx.generate.__main__ import main, setup_arg_parser
from glass_mlx.models.architectures import tiny_model
from helpers import made_prior, prior_with_curves, save_tiny_folder, write_gguf

import pytest
from mlx_lm.generate import setup_arg_parser as mlx_lm_arg_parser


@pytest.fixture
def folder(tmp_path):
    folder = save_tiny_folder(tmp_path / "tiny")
    prior_with_curves(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    return folder


@pytest.fixture
def command(run_command):
    return partial(run_command, main)


def test_the_command_answers_and_prints_statistics(command, folder):
    options = ("--density", 0.5, "--warmup", 2, "--refresh", 4)
    code, out, _ = command("--model", folder, "-p", "丁七丄", "-m", 8, *options)
    lines = out.splitlines()
    assert code == 0
    assert len(lines[1]) == 8
    assert [line.split(":")[0] for line in lines[3:]] == [
        "Prompt",
        "Generation",
        "Peak memory",
        "GLASS",
        "GLASS",
    ]
    assert "density 0.500" in lines[6]
    assert lines[7].startswith("GLASS: 3 tokens dense, 2 selections: select ")
    assert str(folder / "glass_prior.safetensors") in lines[6]


def test_quiet_output_is_only_the_text(command, folder):
    _, loud, _ = command("--model", folder, "-p", "丁七丄", "-m", 8, "--density", 0.5)
    code, out, err = command(
        "--model", folder, "-p", "丁七丄", "-m", 8, "--density", 0.5, "--verbose", "F"
    )
    assert (code, out, err) == (0, loud.splitlines()[1] + "\n", "")


def test_the_prompt_can_come_from_standard_input(command, folder):
    arguments = ("--model", folder, "-m", 8, "--verbose", "F")
    assert command(*arguments, "-p", "-", stdin="丁七丄") == command(*arguments, "-p", "丁七丄")


def test_messages_that_need_a_chat_template_are_noted_without_one(command, folder):
    arguments = ("--model", folder, "-p", "丁七", "-m", 2)
    for flag in ("--system-prompt", "--prefill-response"):
        code, _, err = command(*arguments, flag, "丁")
        assert code == 0
        assert "note: --system-prompt and --prefill-response have no effect without a" in err
        assert command(*arguments, flag, "丁", "--verbose", "F")[2] == ""
    assert "note" not in command(*arguments)[2]


def test_an_end_token_is_given_by_its_text_or_id(command, folder):
    arguments = ("--model", folder, "-p", "丁七丄", "-m", 8, "--verbose", "F")
    text = command(*arguments)[1].strip()
    identifier = ord(text[1]) - 0x4E00
    for token in (text[1], identifier):
        assert command(*arguments, "--extra-eos-token", token)[1].strip() == text[0]


def test_dense_generation_gives_the_text_of_density_1(command, folder):
    code, out, _ = command("--model", folder, "-p", "丁七丄", "-m", 8, "--dense")
    assert code == 0
    assert "GLASS" not in out
    _, all_neurons, _ = command("--model", folder, "-p", "丁七丄", "-m", 8, "--density", 1)
    assert all_neurons.splitlines()[1] == out.splitlines()[1]


def test_the_seed_determines_the_text(command, folder):
    arguments = ("--model", folder, "-p", "丁七丄", "-m", 20, "--temp", 1.5, "--verbose", "F")
    one, two = command(*arguments, "--seed", 1), command(*arguments, "--seed", 2)
    assert one == command(*arguments, "--seed", 1)
    assert one != two


def test_every_flag_of_mlx_lm_is_accepted():
    ours = set(setup_arg_parser()._option_string_actions)
    assert set(mlx_lm_arg_parser()._option_string_actions) <= ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "the density must be above 0 and at most 1, not 0.0"),
        (["--density", "2"], "the density must be above 0"),
        (["--prior-weight", "-1"], "the prior weight λ must be between 0 and 1"),
        (["--max-tokens", "0"], "must be at least 1, or -1 for no limit"),
        (["--prior", "missing.safetensors"], "there is no prior at missing.safetensors"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "-"], "the prompt is empty"),
        (["--model", "missing.gguf"], "there is no model at missing.gguf"),
        (["--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--chat-template-config", "[1]"], "must be a JSON object"),
        (["--draft-model", "./missing"], "there is no model at ./missing"),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens must be at least 0, not -1"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be at least 1, not 0"),
        (["--image", "a.png"], "--image cannot be combined"),
        (["--adapter-path", "missing"], "adapter path does not exist: missing"),
        (["--statistic", "mean"], "invalid choice: 'mean'"),
        (["--no-prior", "--prior", "x"], "not allowed with argument"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(command, folder, arguments, message):
    code, out, err = command("--model", folder, *arguments)
    assert code == 2
    assert out == ""
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("glass-mlx: error: ")
    assert message in last
    assert "Traceback" not in err


def test_a_prior_for_another_model_is_refused(command, folder, tmp_path):
    made_prior(tiny_model("llama", seed=1)).save(tmp_path / "other.safetensors")
    code, _, err = command("--model", folder, "--prior", tmp_path / "other.safetensors")
    assert code == 2
    assert err.count("\n") == 1
    assert "is not for this model: it was measured on a model with other weights" in err


def test_a_truncated_gguf_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), file)
    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = command("--model", file)
    assert code == 2
    assert "is not a complete GGUF file" in err
    assert not list((tmp_path / "cache/models").iterdir())


def test_interruption_is_quiet(command, folder, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "run", interrupt)
    assert command("--model", folder) == (130, "", "")


@pytest.mark.slow
def test_generation_with_the_built_in_model(default_gguf):
    """Run the command as users do: 4-bit weights, the packaged prior, streamed text."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "glass_mlx.generate", "--ignore-chat-template"),
            *("-p", "The capital of France is", "-m", "4", "--warmup", "1", "--density", "0.9"),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "density 0.903" in result.stdout
    assert "priors/SmolLM2-135M-Instruct.safetensors" in result.stdout


def test_a_model_without_a_prior_gets_a_small_one_on_first_use(
    command, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    (folder / "glass_prior.safetensors").unlink()
    arguments = ("--model", folder, "-p", "丁七丄", "-m", 3)
    assert command(*arguments, "--no-prior", "--density", 0.5)[0] == 0
    assert not (tmp_path / "cache").exists()

    assert command(*arguments)[0] == 0  # its own text needs none
    assert not (tmp_path / "cache").exists()

    arguments += ("--max-kl", 1)
    code, out, err = command(*arguments)
    assert code == 0
    (prior_file,) = (tmp_path / "cache/priors").iterdir()
    assert prior_file.name.startswith("tiny-")
    assert f"prior {prior_file}" in out
    assert "tok/s" in err  # the progress display
    assert f"Measuring a small one once, on 24 texts by the model, into {prior_file}" in err
    assert f"glass-mlx calibrate --model {folder} --output {prior_file}" in err
    content = prior_file.read_bytes()

    code, out, err = command(*arguments)
    assert code == 0
    assert f"using {prior_file}" in err
    assert "Measuring" not in err
    assert prior_file.read_bytes() == content


def test_it_reports_where_it_searched_for_the_prior(command, folder, tmp_path, monkeypatch):
    file = folder / "glass_prior.safetensors"
    arguments = ("--model", folder, "-p", "丁七丄", "-m", 3)
    assert f"prior: using {file}" in command(*arguments)[2]
    moved_file = tmp_path / "moved.safetensors"
    file.rename(moved_file)
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    _, _, err = command(*arguments)
    assert f"prior: no glass_prior.safetensors in the model's folder {folder}" in err
    assert "; none for this model in " in err
    assert f"prior: using {moved_file}" in command(*arguments, "--prior", moved_file)[2]
    assert command(*arguments, "--prior", moved_file, "--verbose", "F")[2] == ""


def test_the_prior_can_rank_by_another_statistic(command, folder):
    arguments = ("--model", folder, "-p", "丁七丄", "-m", 3)
    code, _, err = command(*arguments, "--prior-statistic", "impact")
    assert code == 2
    assert "has no statistic 'impact'; it has activation, griffin" in err
    assert command(*arguments, "--prior-statistic", "activation")[0] == 0


def test_a_draft_model_proposes_tokens(command, folder):
    arguments = ("--model", folder, "--prompt", "丁七丄", "--max-tokens", 30)
    texts = {
        command(*arguments, *flags, *draft)[1].split("=" * 10)[1]
        for flags in (["--dense"], ["--density", 1.0])
        for draft in ([], ["--draft-model", folder, "--num-draft-tokens", 4])
    }
    assert len(texts) == 1


def test_a_saved_prompt_cache_has_the_entries_of_the_draft_model(command, folder, tmp_path):
    file = tmp_path / "cache.safetensors"
    begin = ("--model", folder, "--prompt", "丁七丄", "--max-tokens", 9, "--density", 0.5)
    begin += ("--save-prompt-cache", file)
    goes_on = ("--prompt-cache-file", file, "--prompt", "丂", "--max-tokens", 9, "--density", 0.5)
    draft = ("--draft-model", folder)
    assert command(*begin, *draft)[0] == 0
    assert command(*goes_on, *draft)[0] == 0
    code, _, err = command(*goes_on)
    assert (code, "it has 8 layers" in err) == (2, True)
    assert command(*begin)[0] == 0
    code, _, err = command(*goes_on, *draft)
    assert (code, "has no entries for the draft model" in err) == (2, True)
    assert "Traceback" not in err


def test_a_draft_model_with_another_tokenizer_is_refused(command, folder, tmp_path):
    other = save_tiny_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["丁"], words["七"] = words["七"], words["丁"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out, err = command("--model", folder, "--draft-model", other, "--prompt", "丂")
    assert (code, out) == (2, "")
    assert "has another tokenizer than the model" in err.splitlines()[-1]


def test_a_limit_is_needed_for_dense_text_with_drafts(command, folder):
    flags = ("--dense", "--draft-model", folder, "--max-tokens", -1, "--prompt", "丂")
    code, _, err = command("--model", folder, *flags)
    assert (code, "--max-tokens -1 cannot be combined" in err) == (2, True)


@pytest.mark.parametrize("flags", [["--dense"], ["--density", 0.5]])
def test_drafts_that_could_not_be_taken_back_are_refused(command, folder, flags):
    flags += ["--draft-model", folder, "--max-kv-size", 16, "--prompt", "丂"]
    code, out, err = command("--model", folder, *flags)
    assert (code, out.strip("=\n")) == (2, "")
    assert "keeps only the latest 16 tokens" in err.splitlines()[-1]
