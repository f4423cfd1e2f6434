"""Every command refuses bad values with one sentence and exit code 2, before it loads a model."""

import importlib

from glass_mlx.cli import COMMANDS
from helpers import letter_tokenizer, save_tiny_folder

import pytest

# The arguments that a command needs, and bad values of its flags with a part of the message.
GENERATE = ("generate", ["--prompt", "丁", "--no-prior"])
CACHE_PROMPT = ("cache_prompt", ["--prompt", "丁", "--prompt-cache-file", "c.safetensors"])
CALIBRATE = ("calibrate", ["--output", "p.safetensors"])
EXPORT = ("export", ["--no-prior", "--prompts", "prompts.txt", "--output", "x"])
FIDELITY = ("fidelity", ["--prompts", "prompts.txt"])
LATENCY = ("latency", [])

BAD_VALUES = [
    (*GENERATE, "--density nan", "the density must be above 0"),
    (*GENERATE, "--density inf", "the density must be above 0"),
    (*GENERATE, "--max-kl nan", "the bound on KL must be at least 0"),
    (*GENERATE, "--max-tokens -5", "must be at least 1, or -1"),
    (*GENERATE, "--seed -1", "the seed must be from 0"),
    (*GENERATE, "--seed 99999999999999999999", "the seed must be from 0"),
    (*GENERATE, "--temp -1", "--temp must be at least 0"),
    (*GENERATE, "--temp nan", "--temp must be at least 0"),
    (*GENERATE, "--temp inf", "--temp must be at least 0"),
    (*GENERATE, "--top-p 2", "--top-p must be from 0 to 1"),
    (*GENERATE, "--top-k -1", "--top-k must be at least 0"),
    (*GENERATE, "--min-p nan", "--min-p must be from 0 to 1"),
    (*GENERATE, "--min-tokens-to-keep 0", "--min-tokens-to-keep must be at least 1"),
    (*GENERATE, "--xtc-probability 2", "--xtc-probability must be from 0 to 1"),
    (*GENERATE, "--xtc-threshold 0.7", "--xtc-threshold must be from 0 to 0.5"),
    (*GENERATE, "--max-kv-size 0", "--max-kv-size must be at least 1"),
    (*GENERATE, "--kv-bits 7", "--kv-bits must be one of 2, 3, 4, 5, 6, 8"),
    (*GENERATE, "--kv-group-size 7", "--kv-group-size must be one of 32, 64, 128"),
    (*GENERATE, "--quantized-kv-start -1", "--quantized-kv-start must be at least 0"),
    (*GENERATE, "--prefill-step-size 0", "--prefill-step-size must be at least 1"),
    (*GENERATE, "--warmup 0", "the warm-up must be at least 1"),
    (*GENERATE, "--refresh 1", "refresh must be at least 2"),
    (*GENERATE, '--chat-template-config {"messages":[]}', "cannot set messages"),
    (*GENERATE, '--chat-template-config {"tokenize":1}', "cannot set tokenize"),
    (
        *GENERATE,
        '--chat-template-config {"continue_final_message":1}',
        "cannot set continue",
    ),
    (*GENERATE, "--chat-template-config [1]", "must be a JSON object"),
    (*GENERATE, "--prompt-cache-file none", "there is no prompt cache at none"),
    (*GENERATE, "--save-prompt-cache /dev/null", "must have a name that ends in .safetensors"),
    (*CACHE_PROMPT, "--max-kv-size -1", "--max-kv-size must be at least 1"),
    (*CACHE_PROMPT, "--kv-bits 1", "--kv-bits must be one of"),
    (*CALIBRATE, "--seed -1", "the seed must be from 0"),
    (*CALIBRATE, "--temp nan", "must be positive"),
    (*CALIBRATE, "--length 3", "the length must be above"),
    (*CALIBRATE, "--until-stable nan", "--until-stable must be between 0 and 1"),
    (*CALIBRATE, "--recipe bos=nan", "the weight of the recipe"),
    (*CALIBRATE, "--recipe corpus:none", "there is no corpus at none"),
    (*CALIBRATE, "--recipe corpus:.", "is not a regular file"),
    (*EXPORT, "--seed -1", "the seed must be from 0"),
    (*EXPORT, "--density nan", "the density must be above 0"),
    (*EXPORT, "--prior-weight nan", "the prior weight"),
    (*EXPORT, "--temp nan", "the temperature of sampling must be positive"),
    (*EXPORT, "--prompts none", "there is no prompts file at none"),
    (*EXPORT, "--prompts .", "is a folder"),
    (*FIDELITY, "--seed -1", "the seed must be from 0"),
    (*FIDELITY, "--density 0", "the density must be above 0"),
    (*FIDELITY, "--tokens 0", "--tokens must be at least 2"),
    (*FIDELITY, "--prompts none", "there is no prompts file at none"),
    (*FIDELITY, "--json .", "is a folder"),
    (*LATENCY, "--seed -1", "the seed must be from 0"),
    (*LATENCY, "--repetitions 1", "at least 2 repetitions"),
    (*LATENCY, "--json .", "is a folder"),
    (*LATENCY, "--bits 4", "are for random weights; give --shape"),
    (*LATENCY, "--mode affine", "are for random weights; give --shape"),
    (*LATENCY, "--down-policy none", "invalid choice: 'none'"),
    ("generate", ["--prompt", "丁"], "--prior=", "--prior is empty"),
    (*GENERATE, "--model=", "--model is empty"),
    (*GENERATE, "--save-prompt-cache=", "--save-prompt-cache is empty"),
    (*GENERATE, "--save-prompt-cache prompts.txt/a.safetensors", "cannot be written in"),
    (*GENERATE, f"--save-prompt-cache {'x' * 300}.safetensors", "File name too long"),
    (*GENERATE, "--extra-eos-token nothing", "nothing is not a token of this model"),
    (*GENERATE, "--extra-eos-token -1", "-1 is not a token of this model"),
    (*GENERATE, "--extra-eos-token 256", "the token 256 is not among the model's 256 tokens"),
    (*GENERATE, "--num-draft-tokens x", "invalid int value: 'x'"),
    (*GENERATE, "--seed x", "argument --seed: invalid int value: 'x'; --help lists the flags"),
    (*GENERATE, "--no-such-flag", "unrecognized arguments: --no-such-flag"),
    (*GENERATE, "--adapter-path folder", "folder/adapter_config.json: No such file or directory"),
    (*CACHE_PROMPT, "--kv-bits x", "invalid int value: 'x'"),
    (*CACHE_PROMPT, "--prompt-cache-file .safetensors", "must have a name that ends in"),
    (*CALIBRATE, "--output=", "argument --output: the name is empty"),
    (*CALIBRATE, "--output folder", "folder is a folder; give the name of a file"),
    (*CALIBRATE, "--output prompts.txt/p", "cannot be written in"),
    (*CALIBRATE, "--picture a.png", "--picture goes with --show"),
    (*CALIBRATE, "--push-to-hub a/b/c", "a/b/c is not the name of a repository"),
    (*CALIBRATE, "--push-to-hub=", "--push-to-hub is empty"),
    (*CALIBRATE, "--tokens x", "invalid int value: 'x'"),
    (*EXPORT, "--prompts /dev/null", "is neither a file nor a pipe"),
    (*EXPORT, "--tokens x", "invalid int value: 'x'"),
    (*FIDELITY, "--plots prompts.txt", "cannot be written in"),
    (*FIDELITY, "--markdown prompts.txt/a", "cannot be written in"),
    (*FIDELITY, "--methods x", "invalid choice: 'x'"),
    (*LATENCY, "--plot prompts.txt/a", "cannot be written in"),
    (*LATENCY, "--repetitions x", "invalid int value: 'x'"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(("command", "needed", "flags", "message"), BAD_VALUES)
def test_a_bad_value_is_refused_in_one_sentence(
    run_command, folder, tmp_path, monkeypatch, command, needed, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("丁\n")
    (tmp_path / "folder").mkdir()
    main = importlib.import_module(COMMANDS[command][0]).main
    code, out, err = run_command(main, "--model", folder, *needed, *flags.split(" "))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert ": error: " in err
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "prompts.txt"]


def test_a_conversation_is_saved_before_the_closing_lines_are_printed(
    run_command, folder, tmp_path, monkeypatch
):
    def fail(response):
        raise BrokenPipeError

    file = tmp_path / "talk.safetensors"
    module = importlib.import_module("glass_mlx.generate.__main__")
    monkeypatch.setattr(module, "summary", fail)
    monkeypatch.setattr("glass_mlx.errors._discard_output", lambda: None)
    arguments = ("--model", folder, *GENERATE[1], "-m", 3, "--save-prompt-cache", file)
    assert run_command(module.main, *arguments)[0] == 141
    assert file.is_file()


def test_a_tilde_in_a_path_is_the_home_folder(run_command, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    main = importlib.import_module("glass_mlx.generate.__main__").main
    arguments = ("--model", folder, *GENERATE[1], "-m", 3)
    assert run_command(main, *arguments, "--save-prompt-cache=~/talk.safetensors")[0] == 0
    assert (tmp_path / "talk.safetensors").is_file()
    assert run_command(main, *arguments, "--prompt-cache-file=~/talk.safetensors")[0] == 0
    export = importlib.import_module("glass_mlx.export").main
    (tmp_path / "prompts.txt").write_text("丁丂\n")
    flags = ("--no-prior", "--prompts=~/prompts.txt", "--output=~/sliced", "--tokens", 24)
    assert run_command(export, "--model", folder, *flags)[0] == 0
    assert (tmp_path / "sliced/config.json").is_file()


def test_an_option_of_a_chat_template_may_have_any_other_name(run_command, tmp_path):
    folder, tokenizer = save_tiny_folder(tmp_path / "chat"), letter_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ tokenizer }}{{ ignore_template }}"
    tokenizer.save_pretrained(folder)
    main = importlib.import_module("glass_mlx.generate.__main__").main
    arguments = ("--model", folder, "--prompt", "丁", "--no-prior", "-m", 3)
    options = '{"tokenizer": "丂七", "ignore_template": "丄"}'
    code, out, _ = run_command(main, *arguments, "--chat-template-config", options)
    assert code == 0
    assert "Prompt: 4 tokens" in out
    options = '{"tokenizer": "\\ud83d"}'
    code, _, err = run_command(main, *arguments, "--chat-template-config", options)
    assert (code, err) == (2, "glass-mlx: error: the text is not valid UTF-8 text\n")
