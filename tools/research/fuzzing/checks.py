"""Open mutated files as a user does, and judge what happens."""

import os
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.cases import FORMATS, GGUF_FILE, Case, make_case, seed_files
from fuzzing.mutation import Expected
from fuzzing.seeds import CACHE_FILE, GENERATION, PROMPT, SCHEDULE, Files, model, tokenizer
from glass_mlx import (
    GlassConfig,
    GlobalPrior,
    Session,
    load,
    load_prompt_cache,
    stream_generate,
)
from glass_mlx.chat_templates import encode
from glass_mlx.conversation import Conversation
from glass_mlx.prior.file import FILE_NAME
from glass_mlx.streaming import new_detokenizer

import mlx.core as mx
import numpy as np

REFUSED, LOADED, FAILED = "refused", "loaded", "failed"

# Opening a file and generating from it may take this much memory, for example for a long chat
# template, and this many times the file's size.
MAX_BYTES, MAX_SIZES = 192 << 20, 20
# The address space may grow by more than that, for threads and their arenas.
_ADDRESS_SPACE = 1 << 30

_MAX_MESSAGE = 1000
# What Python, NumPy, transformers and MLX say of an error in a program, and not of a file.
_INTERNALS = re.compile(
    "|".join(
        (
            r"index out of range|out of bounds|is not in list|(list|string) indices|sequence item",
            r"NoneType|'\w+' object|object of type|<class '|\b0x[0-9a-f]{4}|array\(|dtype\(",
            r"unhashable|has no attribute|not (iterable|subscriptable|callable)|bytes-like",
            r"unsupported operand|not supported between|division by zero|math domain|truth value",
            r"positional argument|keyword argument|incompatible function|unrecognized arguments",
            r"invalid literal for|could not convert|cannot convert float|as an integer|zip\(\)",
            r"must be real number|must be str,|expected str\b|codec can't|values to unpack",
            r"cannot reshape|broadcast|buffer is smaller|data type .* not understood|too large to",
            r"\b\w+(Error|Exception)\b|Traceback|__(?!metadata__)\w+__|recursion depth",
            r"json\.exception|std::|bad_alloc|out of memory|Unable to allocate",
            # names of MLX's functions
            r"\[(?!load_safetensors\]|safetensors?\])[a-z]\w+\]",
        )
    )
)
# A message that is only a key or another value: what str() makes of a KeyError.
_BARE_VALUE = re.compile(r"(?:.*[:(] ?)?(['\"])[^'\"]*\1\)?|(?:.*: ?)?-?\d+|.*: ?\(?\)?")

_MESSAGES = [{"role": "user", "content": "hello world"}]
_TEXTS = ("hello world", "<s><|im_start|>hell w</s>")


class WrongLoad(Exception):
    """The error that files were loaded, but wrongly."""


@dataclass(frozen=True)
class Outcome:
    """What happened when files were opened.

    Attributes:
        number: the case's number.
        format: its format.
        status: REFUSED, LOADED or FAILED.
        what: the change to the files.
        detail: the message of a refusal, or the reason of a failure.
    """

    number: int
    format: str
    status: str
    what: str
    detail: str = ""


# What a generation gave: token ids and log-probabilities.
Output = list[np.ndarray]


def prepare(formats: list[str], folder: str) -> None:
    """Open all valid files once, so that libraries are imported and outputs are known.

    Args:
        formats: the formats of the files.
        folder: the folder for temporary files, which crashes leave behind.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    tempfile.tempdir = folder
    for kind in formats:
        for name in seed_files(kind):
            seed_output(kind, name)


def run_case(number: int, seed: int) -> Outcome:
    """Make a case, open its files twice, and judge what happens."""
    return judge(make_case(seed, number))


def judge(case: Case) -> Outcome:
    """Open a case's files twice, and judge what happens."""
    expected_output = seed_output(case.format, case.seed)
    try:
        with tempfile.TemporaryDirectory() as folder, _bounded_memory(case):
            _write(case.files, Path(folder))
            outputs = [_attempt(case, Path(folder)) for _ in range(2)]
        first, second = outputs
        if isinstance(first, str) or isinstance(second, str):
            if first != second:
                raise WrongLoad(f"opened twice: {_told(first)}, then {_told(second)}")
            if case.mutation.expected is Expected.SAME:
                raise WrongLoad(f"it is refused: {first}")
            return _outcome(case, REFUSED, str(first))
        _check_output(case.mutation.expected, first, second, expected_output)
    except WrongLoad as error:
        return _outcome(case, FAILED, str(error))
    except Exception as error:
        return _outcome(case, FAILED, describe_error(error))
    return _outcome(case, LOADED)


def _outcome(case: Case, status: str, detail: str = "") -> Outcome:
    return Outcome(case.number, case.format, status, f"{case.seed}: {case.mutation.what}", detail)


def _told(result: Output | str) -> str:
    return f"refused ({result})" if isinstance(result, str) else "loaded"


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _attempt(case: Case, folder: Path) -> Output | str:
    """Open files; return the output, or the message of a proper refusal."""
    try:
        return OPENERS[case.format](folder, case.seed)
    except (ValueError, OSError) as error:
        if defect := message_defect(error):
            raise WrongLoad(f"{defect}: {describe_error(error)}") from error
        # The folder is another one in every run.
        return str(error).replace(str(folder), "FOLDER")


def message_defect(error: Exception) -> str | None:
    """Return what is wrong with an error that a user sees, or None.

    The error must be glass-mlx's own, and its message one readable line.
    """
    message = str(error)
    if type(error) is not ValueError and not isinstance(error, OSError):
        is_own = type(error).__module__.startswith("glass_mlx")
        if not is_own:
            return "an error of another library"
    if not message.strip():
        return "no message"
    if not message.isprintable():
        return "a message with line breaks or control characters"
    if len(message) > _MAX_MESSAGE:
        return "a long message"
    text = re.sub(r"/\S*", "FILE", message)
    if match := _INTERNALS.search(text):
        return f"a message with {match[0]!r}"
    return "a message without words" if _BARE_VALUE.fullmatch(text) else None


def describe_error(error: BaseException) -> str:
    """Return an error's type and message, and the last lines of code before it."""
    origin: BaseException = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    frames = traceback.extract_tb(origin.__traceback__)
    own = [frame for frame in frames if "glass_mlx" in frame.filename]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in [*own[-1:], *frames[-1:]]]
    message = " ".join(str(error).split())[:300]
    shown = f"{type(error).__name__}: {message}"
    if origin is not error:
        shown += f" from {type(origin).__name__}"
    return f"{shown} at {' and '.join(dict.fromkeys(places))}"


def _check_output(expected: Expected, first: Output, second: Output, seed: Output) -> None:
    """Raise WrongLoad unless the output of files that were loaded is right."""
    if not _equal(first, second):
        raise WrongLoad("two loads give different output")
    if expected is Expected.REFUSED:
        raise WrongLoad("it is loaded, which must be refused")
    if expected in (Expected.SAME, Expected.SAME_IF_LOADED) and not _equal(first, seed):
        raise WrongLoad("it is loaded, and gives other output than before the change")
    if expected is Expected.FINITE and not all(np.isfinite(array).all() for array in first):
        raise WrongLoad("it is loaded, and its output is not finite")


def _equal(one: Output, two: Output) -> bool:
    return len(one) == len(two) and all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(one, two, strict=True)
    )


@cache
def seed_output(kind: str, name: str) -> Output:
    """Return the output of a seed's valid files."""
    with tempfile.TemporaryDirectory() as folder:
        _write(seed_files(kind)[name], Path(folder))
        return OPENERS[kind](Path(folder), name)


# --- Opening --------------------------------------------------------------------------------------


def _generate(dense: Any, words: Any, prompt: Any, tokens: int = 5, **options: Any) -> Output:
    """Generate a few tokens, with slices and renewals; return them and their log-probabilities."""
    responses = list(stream_generate(dense, words, prompt, tokens, **GENERATION | options))
    assert all(isinstance(response.text, str) for response in responses)
    output = [np.array([response.token for response in responses], np.float64)]
    return output + [np.array(r.logprobs.astype(mx.float32)) for r in responses]


def _open_model(path: Path, cache_folder: Path) -> Output:
    """Load a model, encode texts and messages, generate, and turn all token ids into text."""
    os.environ["GLASS_MLX_CACHE"] = str(cache_folder)
    dense, words = load(str(path))
    output: Output = []
    rows = _embedding_rows(dense)
    for prompt in (*_TEXTS, encode(words, _MESSAGES)):
        output += _generate(dense, words, prompt)
        ids = words.encode(prompt) if isinstance(prompt, str) else prompt
        if rows and not all(0 <= identifier < rows for identifier in ids):
            raise WrongLoad(f"token id {max(ids)} reaches a model with {rows} embeddings")
    for identifier in range(rows):
        detokenizer = new_detokenizer(words)
        detokenizer.add_token(identifier)
        detokenizer.finalize()
        assert isinstance(detokenizer.text, str)
    return output


def _embedding_rows(dense: Any) -> int:
    """Return the number of rows of a model's embedding, or 0 if it is not in the usual place."""
    embedding = getattr(getattr(dense, "model", None), "embed_tokens", None)
    return 0 if embedding is None else int(embedding.weight.shape[0])


def _open_gguf(folder: Path, seed: str) -> Output:
    return _open_model(folder / GGUF_FILE, folder / "cache")


def _open_folder(folder: Path, seed: str) -> Output:
    return _open_model(folder, folder / "cache")


def _open_prior(folder: Path, seed: str) -> Output:
    """Load a prior, and generate with it at a fixed density and at a bound on KL."""
    os.environ["GLASS_MLX_CACHE"] = str(folder / "cache")
    file, dense = folder / FILE_NAME, model(seed)
    prior = GlobalPrior.load(file)
    output = _generate(dense, tokenizer(), PROMPT, prior=file)
    output += _generate(dense, tokenizer(), PROMPT, prior=file, uniform=True)
    if prior.curve(Session(dense).conditions(GlassConfig(**SCHEDULE))) is not None:
        options = {"density": None, "vocabulary": None, "max_kl": 0.5}
        output += _generate(dense, tokenizer(), PROMPT, prior=prior, **options)
    return output


def _open_cache(folder: Path, seed: str) -> Output:
    """Load a prompt cache, and generate from it; go on with its conversation, if it has one."""
    file = folder / CACHE_FILE
    prompt_cache, _ = load_prompt_cache(file, return_metadata=True)
    output = _generate(model(seed), tokenizer(), PROMPT[:4], prompt_cache=prompt_cache)
    try:
        conversation = Conversation.load(str(file))
        conversation.unread_tokens(model(seed), tokenizer(), list(_MESSAGES), False, True, {})
    except ValueError as error:  # the cache alone can still be used
        if defect := message_defect(error):
            raise WrongLoad(f"as a conversation, {defect}: {describe_error(error)}") from error
    return output


# What opens each format: from a folder of files and their seed's name to the output.
OPENERS: dict[str, Callable[[Path, str], Output]] = {
    "gguf": _open_gguf,
    "prior": _open_prior,
    "cache": _open_cache,
    **dict.fromkeys(("tokenizer", "config", "weights"), _open_folder),
}
assert OPENERS.keys() == FORMATS.keys()


# --- Memory ---------------------------------------------------------------------------------------


@contextmanager
def _bounded_memory(case: Case) -> Iterator[None]:
    """Raise WrongLoad if more memory is taken than the files' size justifies."""
    limit = MAX_BYTES + MAX_SIZES * sum(map(len, case.files.values()))
    mx.clear_cache()
    before = _peak_memory(reset=True)
    with _bounded_address_space(limit + _ADDRESS_SPACE):
        yield
    taken = _peak_memory() - before
    if taken > limit:
        raise WrongLoad(f"it takes {taken >> 20} MiB of memory, more than {limit >> 20} MiB")


def _peak_memory(reset: bool = False) -> int:
    """Return the peak of this process's memory in bytes, on Linux since the latest reset."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(peak) << 10


@contextmanager
def _bounded_address_space(growth: int) -> Iterator[None]:
    """Make larger allocations fail, on Linux, so that they do not slow the machine down."""
    if sys.platform != "linux":
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + growth, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
