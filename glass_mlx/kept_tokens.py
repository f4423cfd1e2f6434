"""The tokens that every shortlist of a text has, however improbable they look."""

import inspect
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

# Byte-level tokenizers write bytes as characters below this code.
_BYTE_LEVEL_CODES = 0x144

# mlx-lm's logits processor for a logit bias.
_LOGIT_BIAS = "make_logits_processors.<locals>.logit_bias_processor"

_WORD = re.compile(r"\w+")

# Vocabularies have tokens for later use, which no text contains. Gemma's has 6,242.
_FOR_LATER_USE = re.compile("unused|reserved", re.IGNORECASE)


class KeptTokens:
    """The tokens to keep for a text.

    A word has other tokens at the start of a line, after a space and after a quotation mark. An
    answer often repeats words of the prompt in another place, as when JSON is written from
    sentences (docs/experiments.md has figures). So all spellings of the text's words are kept.

    Args:
        tokenizer: the model's tokenizer.
        more: further tokens that are kept for every text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, more: Iterable[int] = ()) -> None:
        self._tokenizer, self._more = tokenizer, more

    @cached_property
    def _always(self) -> frozenset[int]:
        return _special_tokens(self._tokenizer).union(self._more)

    def __call__(self, text: Sequence[int]) -> frozenset[int]:
        """Return the tokens to keep for a text.

        These are its tokens, those of its words in other places and with the first letter in the
        other case, special and added tokens unless they are for later use, those that end a text,
        and those that stand for one byte, of which every text can be put together.
        """
        return self._always.union(text, self._respelled(text))

    def _respelled(self, text: Sequence[int]) -> Iterable[int]:
        words = dict.fromkeys(_WORD.findall(self._tokenizer.decode(text)))
        forms = dict.fromkeys(form for word in words for form in (word, _with_other_case(word)))
        places = "".join(f'"{form}" {form}' for form in forms)
        return self._tokenizer.encode(places, add_special_tokens=False)


def _with_other_case(word: str) -> str:
    """Return a word whose first letter is a capital letter instead of a small one, or reversed."""
    return word[:1].swapcase() + word[1:]


def _special_tokens(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return special and added tokens, those that end a text, and those of single bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += [chr(code) for code in range(_BYTE_LEVEL_CODES)]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    special_names = zip(special, tokenizer.convert_ids_to_tokens([*special]), strict=True)
    used = (token for token, name in special_names if not _FOR_LATER_USE.search(name or ""))
    kept = {*used, *tokenizer.convert_tokens_to_ids(names), *tokenizer.eos_token_ids}
    return frozenset(int(token) for token in kept if token is not None)


def biased_tokens(processors: Iterable[Any]) -> frozenset[int]:
    """Return the tokens with a logit bias from `mlx_lm.sample_utils.make_logits_processors`."""
    biased: set[int] = set()
    for processor in processors:
        if getattr(processor, "__qualname__", "") == _LOGIT_BIAS:
            biased.update(inspect.getclosurevars(processor).nonlocals["indices"].tolist())
    return frozenset(biased)
