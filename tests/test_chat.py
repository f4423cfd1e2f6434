"""The chat command: a conversation, its commands, and Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial

from glass_mlx import chat as chat_command
from glass_mlx import load, make_prompt_cache, stream_generate
from glass_mlx.chat import HELP, main, setup_arg_parser
from glass_mlx.chat_templates import encode
from helpers import (
    letter_tokenizer,
    save_chat_folder,
)

import pytest
from mlx_lm.chat import setup_arg_parser as mlx_lm_arg_parser


@pytest.fixture
def folder(tmp_path):
    return save_chat_folder(tmp_path / "tiny")


@pytest.fixture
def chat(run_command, folder):
    """Return a function that chats: lines in, answers out, one for each line."""

    def chat(*lines, flags=()):
        arguments = ("--model", folder, "--max-tokens", 30, *flags)
        code, out, err = run_command(main, *arguments, stdin="\n".join(lines))
        assert code == 0
        assert "Traceback" not in err
        _, *answers = [part.strip() for part in out.split("› ")]
        return answers

    return chat


def test_every_flag_of_mlx_lm_is_accepted():
    flags = {*setup_arg_parser()._option_string_actions}
    assert {*mlx_lm_arg_parser()._option_string_actions} <= flags


def test_a_conversation_goes_on_with_its_statistics(chat, folder):
    model, tokenizer = load(str(folder))
    cache, history, expected = make_prompt_cache(model), [], []
    for text in ("丁七丄", "丂"):
        history.append({"role": "user", "content": text})
        unread = encode(tokenizer, history)[len(cache.tokens) :]
        responses = stream_generate(model, tokenizer, unread, 30, prompt_cache=cache)
        expected.append("".join(response.text for response in responses))
        history.append({"role": "assistant", "content": expected[-1]})
    assert chat("丁七丄", "丂")[:2] == expected
    assert chat("丁七丄", "r", "丁七丄")[2] == expected[0]
    assert expected[0] != expected[1]


def test_the_commands(chat):
    answers = chat("/stats", "h", "/nothing", "丁", "/stats", "", "q", "丁")
    assert answers[0] == "There is no answer yet."
    assert answers[1] == HELP
    assert answers[2] == "/nothing is not a command; h lists the commands."
    assert answers[4].startswith("Prompt: 4 tokens")
    assert "GLASS: the text is the model's own" in answers[4]
    assert answers[5:] == ["", ""]


def test_the_budget_can_be_changed(chat):
    answers = chat(
        "/budget", "丁", "/stats", "/budget 2", "r", "丁", "/stats", "/budget x", "/budget -1"
    )
    assert answers[0] == "There is no KL: answers are the dense model's own."
    assert answers[3] == "KL is bounded by 2 nats per token."
    assert "the model's own" in answers[2]
    assert "within 2 nats" in answers[6]
    assert answers[7] == answers[8] == "The budget is a number from 0 on, as in /budget 0.2"
    answers = chat("/budget", "/budget 1", flags=["--density", 0.5])
    assert answers[0] == "There is no bound: density 0.5, vocabulary 1."
    assert answers[1] == "KL is bounded by 1 nats per token."


def test_the_flags_decide_how_answers_are_generated(chat):
    (dense, stats, _) = chat("丁七丄", "/stats", flags=["--dense"])
    assert "density 1.000" in stats
    assert chat("丁七丄", flags=["--density", 1])[0] == dense
    assert chat("丁七丄", flags=["--system-prompt", "丂"])[0] != dense
    one, two = (chat("丁", flags=["--temp", 1.5, "--seed", seed])[0] for seed in (1, 2))
    assert one != two
    assert chat("丁", flags=["--temp", 1.5, "--seed", 1])[0] == one
    released = chat("丁七丄", "丂", flags=["--density", 0.5, "--release-dense"])
    assert len(released[1]) > 0


def test_an_error_ends_an_answer_and_not_the_chat(chat, folder):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}上"
        "{{ messages[0].content }}"
    )
    tokenizer.save_pretrained(folder)
    first, second, third, _ = chat("丁", "丁", "丁")
    assert "error" not in first
    assert second.startswith("error: the model's chat template does not accept these messages")
    assert third == second


@pytest.mark.parametrize("number", [1, 5, 20])
def test_an_interrupt_stops_the_answer_and_not_the_chat(chat, monkeypatch, number):
    whole = chat("丁七丄")[0]

    def interrupted(*args, **options):
        def responses():
            stream = stream_generate(*args, **options)
            try:
                for response in stream:
                    if response.generation_tokens == number and not sent:
                        sent.append(number)
                        os.kill(os.getpid(), signal.SIGINT)
                    yield response
            finally:
                stream.close()

        return responses()

    sent = []
    monkeypatch.setattr(chat_command, "stream_generate", interrupted)
    first, second, again, _ = chat("丁七丄", "丂", "丂")
    assert first == whole[:number]
    assert len(second) == len(again) == 30


def test_an_interrupt_while_the_prompt_is_read_forgets_the_message(chat, monkeypatch):
    whole = chat("丂")[0]
    sent = []

    def interrupted(*args, **options):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return stream_generate(*args, **options)

    monkeypatch.setattr(chat_command, "stream_generate", interrupted)
    first, second, _ = chat("丁七丄", "丂")
    assert (first, second) == ("", whole)


def test_after_a_failure_the_conversation_goes_on(chat, monkeypatch):
    expected = chat("丁七丄", "丂", flags=["--density", 1])
    turns = []

    def fail_in_the_second(*args, **options):
        turns.append(len(turns))
        stream = stream_generate(*args, **options)

        def responses():
            yield next(stream)
            raise ValueError("the model is broken")

        return responses() if len(turns) == 2 else stream

    monkeypatch.setattr(chat_command, "stream_generate", fail_in_the_second)
    first, second, third, _ = chat("丁七丄", "丁", "丂", flags=["--density", 1])
    assert second.endswith("error: the model is broken")
    assert [first, third] == expected[:2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline"], "--pipeline cannot be combined with slicing"),
        (["--temp", "-1"], "--temp must be at least 0"),
        (["--max-kv-size", "0"], "--max-kv-size must be at least 1"),
        (["--max-tokens", "0"], "must be at least 1, or -1"),
        (["--seed", "-1"], "the seed must be from 0"),
        (["--density", "2"], "the density must be above 0"),
        (["--prior", "missing"], "there is no prior at missing"),
        (["--model", "./missing"], "there is no model at ./missing"),
        (["--draft-model", "./missing"], "there is no model at ./missing"),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens must be at least 0"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be at least 1"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(run_command, folder, flags, message):
    code, out, err = run_command(main, "--model", folder, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("glass-mlx: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_in_a_terminal_lines_can_be_edited_and_interrupted(folder):
    """Run the command in a pseudo-terminal, as a user does."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "glass_mlx.chat", "--model", str(folder)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def wait_for(text, again=lambda: None):
        nonlocal seen
        end = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < end, seen
            if select.select([mine], [], [], 1)[0]:
                seen += os.read(mine, 4096)
            else:
                again()
        seen = seen.split(text.encode(), 1)[1]

    send = partial(os.write, mine)
    try:
        wait_for("› ")
        send(b"budget 0.5\x01/\n")  # Control-A: to the beginning of the line
        wait_for("KL is bounded by 0.5 nats per token.")
        wait_for("› ")
        interrupt = partial(process.send_signal, signal.SIGINT)
        interrupt()
        wait_for("q ends the chat.", again=interrupt)  # readline misses a signal as it begins
        wait_for("› ")
        send(b"\x1b[A\x1b[A\n")  # the earlier line again
        wait_for("KL is bounded by 0.5 nats per token.")
        wait_for("› ")
        send(b"\x04")  # Control-D
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def test_a_draft_model_proposes_tokens(chat, folder):
    lines = ("丁七丄", "丂", "七丁")
    flags = ["--density", 1.0]
    draft = ["--draft-model", folder, "--num-draft-tokens", 4]
    assert chat(*lines, flags=flags + draft) == chat(*lines, flags=flags)
    # Drafts do not change how the conversation goes on after its cache is lost.
    assert chat("丁", "r", *lines, flags=flags + draft)[2:] == chat(*lines, flags=flags)


def test_the_dense_models_own_answers_read_sliced_ones_again(chat, monkeypatch):
    prompts, flags = [], ["--density", 0.5]
    spied = chat_command.stream_generate

    def stream(session, tokenizer, prompt, **options):
        prompts.append(len(prompt))
        return spied(session, tokenizer, prompt, **options)

    monkeypatch.setattr(chat_command, "stream_generate", stream)
    chat("丁", "丁", flags=flags)
    chat("丁", "/budget 0", "丁", flags=flags)
    assert prompts[0] == prompts[2]
    assert prompts[3] > prompts[1]


def test_a_bound_above_0_measures_a_prior_when_it_is_needed(chat, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASS_MLX_CACHE", str(tmp_path / "cache"))
    (folder / "glass_prior.safetensors").unlink()
    answers = chat("丁", "/budget 2", "丁", "/stats")
    assert f"prior {tmp_path / 'cache'}" in answers[3]
