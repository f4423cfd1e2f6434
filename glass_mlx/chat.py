"""Chat with a model in the terminal.

Accepts the flags of `mlx_lm.chat` and some more.
"""

if __name__ == "__main__":  # first, because an interrupt can also come during the imports below
    from glass_mlx.cli import run_command

    run_command("chat")

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

from glass_mlx.arguments import (
    CommandParser,
    add_draft_arguments,
    add_load_arguments,
    add_model_argument,
    check_cache_flags,
    check_minimums,
    check_sampling_flags,
    draft_options,
    load_options,
)
from glass_mlx.checkpoints.builtin import DEFAULT_MODEL
from glass_mlx.checkpoints.loading import load, load_draft
from glass_mlx.command_model import find_prior, load_session
from glass_mlx.config import GlassConfig, check_seed
from glass_mlx.conversation import Conversation, full_history, with_answer
from glass_mlx.errors import check_text, exit_on_error, one_line
from glass_mlx.generation_report import GenerationResponse, summary
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.prior.lookup import given_prior
from glass_mlx.prompt_cache import PromptCache, make_prompt_cache
from glass_mlx.sampling import make_sampler
from glass_mlx.session import Session
from glass_mlx.slicing_arguments import add_slicing_arguments, config_from
from glass_mlx.streaming import check_max_tokens, stream_generate

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.chat import setup_arg_parser as mlx_lm_arg_parser
from mlx_lm.tokenizer_utils import TokenizerWrapper

HELP = """\
q           end the chat (also Ctrl-D)
r           forget the conversation
h           show this help
/budget X   bound KL divergence from the dense model by X nats per token
/stats      show the figures of the last answer
Ctrl-C      stop an answer
All other lines are messages to the model."""


def setup_arg_parser() -> CommandParser:
    """Set up and return the argument parser, with mlx-lm's flags and those of glass-mlx."""
    parser = CommandParser(
        prog="glass-mlx",
        usage="glass-mlx chat [flags]",
        description=__doc__,
        parents=[mlx_lm_arg_parser()],
        conflict_handler="resolve",
    )
    add_model_argument(parser)
    parser.add_argument("--pipeline", action="store_true", help=argparse.SUPPRESS)
    add_load_arguments(parser)
    add_draft_arguments(parser)
    add_slicing_arguments(parser.add_argument_group("slicing"))
    return parser


class _StoppedError(Exception):
    """The user does not want to wait until the prompt has been read."""


class Interrupts:
    """Counts Ctrl-C during an answer, which ends between two tokens and leaves the cache intact.

    Attributes:
        came: whether there was one.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, *_: object) -> None:
        """Handle the signal. A second one ends the command."""
        if self.came:
            raise KeyboardInterrupt
        self.came = True


@contextmanager
def noticed_interrupts() -> Iterator[Interrupts]:
    """Let Ctrl-C be noticed, instead of raising an error at whatever happens then."""
    interrupts = Interrupts()
    handler = signal.signal(signal.SIGINT, interrupts)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, handler)


class Chat:
    """A conversation, and how its answers are generated.

    Args:
        session: the model's session.
        tokenizer: its tokenizer.
        config: how answers are sliced.
        prior: the model's prior; None to find or measure one when an answer needs it, False to go
            without one.
        system_prompt: the system prompt, or None.
        max_kv_size: the maximum size of the cache, or None.
        draft_model: drafts tokens, or None.
        **options: further arguments of `stream_generate`.

    Attributes:
        config: how the next answer is sliced.
        last: the last response, or None.
        conversation: the messages so far, and their prompt cache.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TokenizerWrapper,
        config: GlassConfig,
        prior: GlobalPrior | Literal[False] | None,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
        draft_model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.config, self.last = config, None
        self._session, self._tokenizer, self._prior = session, tokenizer, prior
        self._system_prompt, self._max_kv_size = system_prompt, max_kv_size
        self._draft_model, self._options = draft_model, options
        self.reset()

    last: GenerationResponse | None

    def reset(self) -> None:
        """Forget the conversation."""
        self.conversation = Conversation()

    def set_budget(self, max_kl: float) -> None:
        """Bound the KL divergence of the next answers.

        For the dense model's own answers, what sliced ones have left in the cache is read again.

        Raises:
            ValueError: if the bound is out of range.
        """
        was_exact = self.config.is_exact
        self.config = replace(self.config, max_kl=max_kl, density=None, vocabulary=None)
        if self.config.is_exact and not was_exact:
            self._read_again()

    def answer(self, text: str, show: Callable[[str], object]) -> str:
        """Answer a message, until Ctrl-C at the latest.

        Args:
            text: the message.
            show: called with each part of the answer.

        Returns:
            The answer.

        Raises:
            ValueError: if there can be no answer.
        """
        messages = [{"role": "user", "content": check_text(text, "the message")}]
        if self._system_prompt is not None and not self.conversation.history:
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        conversation = self.conversation
        unread = conversation.unread_tokens(
            self._session.model, self._tokenizer, messages, False, True, {}
        )
        if conversation.cache is None:
            conversation.cache = self._new_cache()
        answer = ""
        try:
            with (
                noticed_interrupts() as interrupts,
                closing(self._responses(unread, interrupts)) as responses,
            ):
                for self.last in responses:
                    answer += self.last.text
                    show(self.last.text)
                    if interrupts.came:
                        break
        except _StoppedError:
            self._read_again()
            return ""
        except Exception:
            self._read_again()
            raise
        history = full_history(conversation.history, messages)
        conversation.history = with_answer(history, answer)
        return answer

    def _read_again(self) -> None:
        """Let the next turn read the conversation again: what the cache holds is not known."""
        conversation = self.conversation
        conversation.cache = None
        if conversation.history:
            conversation.cache = self._new_cache()

    def _new_cache(self) -> PromptCache:
        return make_prompt_cache(self._session, self._max_kv_size, self._draft_model)

    def _responses(self, unread: list[int], interrupts: Interrupts) -> Any:
        def progress(*_: int) -> None:
            if interrupts.came:
                raise _StoppedError

        return stream_generate(
            self._session,
            self._tokenizer,
            unread,
            config=self.config,
            prior=self._prior,
            prompt_cache=self.conversation.cache,
            prompt_progress_callback=progress,
            draft_model=self._draft_model,
            **self._options,
        )


def command(chat: Chat, line: str) -> bool:
    """Carry out a command.

    Args:
        chat: the chat.
        line: what the user entered.

    Returns:
        Whether the line was a command.
    """
    name, _, value = line.partition(" ")
    if line == "r":
        chat.reset()
        print("The conversation is forgotten.")
    elif line in ("h", "/help"):
        print(HELP)
    elif name == "/budget":
        _set_budget(chat, value.strip())
    elif line == "/stats":
        print("There is no answer yet." if chat.last is None else summary(chat.last))
    elif line.startswith("/"):
        print(f"{name} is not a command; h lists the commands.")
    else:
        return False
    return True


def _set_budget(chat: Chat, value: str) -> None:
    if value:
        try:
            chat.set_budget(float(value))
        except ValueError:
            print("The budget is a number from 0 on, as in /budget 0.2")
            return
    config = chat.config
    if config.is_exact:
        print("There is no KL: answers are the dense model's own.")
    elif config.has_budget:
        print(f"KL is bounded by {config.bound:g} nats per token.")
    else:
        shares = config.shares
        print(f"There is no bound: density {shares.density:g}, vocabulary {shares.vocabulary:g}.")


def converse(chat: Chat) -> None:
    """Read lines and answer them until the end of the input. An interrupt ends no chat."""
    with suppress(ImportError):  # gives `input` line editing and a history
        import readline  # noqa: F401
    goes_on = True
    while goes_on:
        try:
            goes_on = _read_and_answer(chat)
        except KeyboardInterrupt:
            print("\nq ends the chat.")


def _read_and_answer(chat: Chat) -> bool:
    """Read a line and answer it; return whether the chat goes on."""
    try:
        line = input("› ").strip()
    except EOFError:
        print()
        return False
    except UnicodeDecodeError:
        print("This is not valid UTF-8 text.")
        return True
    if line == "q":
        return False
    if not line or command(chat, line):
        return True
    try:
        chat.answer(line, lambda text: print(text, end="", flush=True))
    except ValueError as error:
        print(f"error: {one_line(error)}", end="")
    print("\n")
    return True


def check_flags(args: argparse.Namespace) -> GlassConfig:
    """Check the flags, and return how answers are sliced.

    Raises:
        ValueError: for the first value that is out of range.
    """
    if args.pipeline:
        raise ValueError("--pipeline cannot be combined with slicing; use mlx_lm.chat")
    check_max_tokens(args.max_tokens)
    args.min_p, args.top_k, args.min_tokens_to_keep = 0.0, 0, 1
    check_sampling_flags(args)
    args.kv_bits, args.kv_group_size, args.quantized_kv_start = None, 64, 0
    check_cache_flags(args)
    check_seed(args.seed)
    check_minimums(args, prefill_step_size=1, num_draft_tokens=0)
    config = config_from(args)
    return replace(config, max_kl=None, density=1.0, vocabulary=1.0) if args.dense else config


def run(args: argparse.Namespace) -> None:
    """Load the model, and chat.

    Raises:
        FileNotFoundError: if the model or the prior does not exist.
        ValueError: for a bad value, a model that cannot be used or a prior that does not fit.
    """
    config = check_flags(args)
    given = given_prior(args.prior)
    mx.random.seed(args.seed)
    session, tokenizer = load_session(args)
    prior = find_prior(args, session, tokenizer, given, config)
    chat = Chat(
        session,
        tokenizer,
        config,
        False if args.no_prior or args.dense else prior,
        args.system_prompt,
        args.max_kv_size,
        load_draft(args.draft_model, tokenizer, **draft_options(args)),
        num_draft_tokens=args.num_draft_tokens,
        max_tokens=args.max_tokens,
        prefill_step_size=args.prefill_step_size,
        sampler=make_sampler(
            args.temp,
            args.top_p,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        ),
        reload=(lambda: load(args.model, lazy=True, **load_options(args))[0])
        if args.release_dense
        else None,
    )
    print(f"{args.model or DEFAULT_MODEL}. h lists the commands, q ends the chat.")
    converse(chat)


def main() -> None:
    """Run the command; bad input ends with one sentence and exit code 2."""
    with exit_on_error("glass-mlx"):
        run(setup_arg_parser().parse())
