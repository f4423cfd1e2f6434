"""The tokens of a GGUF file: their texts, their types, and which of them are special.

Defaults and special cases follow `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

from collections import defaultdict
from dataclasses import dataclass

from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata, warn

import numpy as np
from gguf import TokenType

# Texts of tokens that end a generation, whatever their type and the keys of the file say.
_END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# Texts of the tokens for filling in the middle, used where the file has no key for them.
_FIM_TEXTS = {
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Special tokens whose id ends a generation.
_ENDING = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Tokens with these texts belong to the text of an answer.
_VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# Special ids where the file has no valid ones, by `tokenizer.ggml.model`.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}
_ID_NAMES = ("bos", "eos", "unknown", "padding", "eot", "eom", *_FIM_TEXTS)

_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_FIRST_STAND_IN, _LAST_STAND_IN = "\ue000", "\ue001"
# Matches what tells a stand-in from the text that it stands for.
STAND_IN_PATTERN = f"{_FIRST_STAND_IN}[0-9]+{_LAST_STAND_IN}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file.

    Attributes:
        tokens: unique texts by id. Where a text is empty or belongs to another token, too, a
            stand-in takes its place, which is the text and then `STAND_IN_PATTERN`.
        types: the `TokenType` of every token, by id.
        special_ids: the ids of special tokens, by their names in metadata keys.
        named: the names in `special_ids` whose tokens are special in transformers, too, which
            never splits them and leaves them out of text.
        end_ids: the ids that end a generation, sorted.
        has_stand_ins: whether any token has a stand-in.
    """

    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int]
    named: frozenset[str]
    end_ids: list[int]
    has_stand_ins: bool

    @property
    def ids(self) -> dict[str, int]:
        """The ids of all tokens."""
        return {token: i for i, token in enumerate(self.tokens)}


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the tokens of a file.

    Raises:
        GGUFError: if there are none, or a key has a value of the wrong type.
    """
    texts = metadata.strings("tokenizer.ggml.tokens")
    if not texts:
        raise GGUFError("it has no tokenizer")
    types = _read_types(metadata, len(texts))
    ids_by_text = defaultdict(list)
    for i, text in enumerate(texts):
        ids_by_text[text].append(i)
    special_ids, explicit = _read_special_ids(metadata, len(texts))
    for name, names in _FIM_TEXTS.items():
        found = [ids_by_text[text][0] for text in names if text in ids_by_text]
        if found and name not in special_ids:
            special_ids[name] = found[0]
            types[found[0]] = TokenType.CONTROL
    end_ids = _find_end_ids(ids_by_text, special_ids, types)
    named = frozenset(
        name
        for name, i in special_ids.items()
        if types[i] != TokenType.NORMAL or _is_named_normal(metadata, name, name in explicit)
    )
    tokens = _unique_texts(texts, types)
    return Vocabulary(tokens, types, special_ids, named, sorted(end_ids), tokens != texts)


def _read_types(metadata: Metadata, count: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    types = metadata.numbers(key)
    if types is None:
        return [TokenType.NORMAL] * count
    check_length(key, types, count)
    if types.dtype.kind not in "iu":
        raise GGUFError(f"its {key} are not integers")
    return types[:count].tolist()


def check_length(key: str, values: np.ndarray, count: int) -> None:
    """Check that an array has a value for every one of `count` tokens."""
    if len(values) < count:
        raise GGUFError(f"its {key} has {len(values)} values for {count} tokens")


def _read_special_ids(metadata: Metadata, count: int) -> tuple[dict[str, int], set[str]]:
    """Return special ids by name, and the names of those that the file has itself.

    An id that no token has is ignored with a warning, as in llama.cpp.
    """
    model = metadata.text("tokenizer.ggml.model")
    defaults = _DEFAULT_IDS.get(model, {})
    special_ids = {name: i for name, i in defaults.items() if i < count}
    explicit = set()
    for name in _ID_NAMES:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in metadata:
            continue
        value = metadata.integer(key, low=-(2**63), high=2**64)
        if 0 <= value < count:
            special_ids[name] = value
            explicit.add(name)
        else:
            instead = f"; using token {special_ids[name]}" if name in special_ids else ""
            warn(f"{key} is {value}, but there are only {count} tokens{instead}")
    return special_ids, explicit


def _is_named_normal(metadata: Metadata, name: str, is_explicit: bool) -> bool:
    """Return whether transformers may know a token of type NORMAL as a special one.

    Its text would be left out wherever the model writes it. So this is only right where the file
    names it as the start or the end of text, or has no types at all.
    """
    if "tokenizer.ggml.token_type" in metadata:
        return is_explicit and name in ("bos", "eos")
    return is_explicit or metadata.text("tokenizer.ggml.model") == "llama"


def _find_end_ids(
    ids_by_text: dict[str, list[int]], special_ids: dict[str, int], types: list[int]
) -> set[int]:
    """Return the ids that end a generation; correct the types of tokens that are known by text."""
    end_ids = {special_ids[name] for name in _ENDING if name in special_ids}
    for text in _END_TEXTS:
        for i in ids_by_text.get(text, ()):
            end_ids.add(i)
            types[i] = TokenType.CONTROL
    for text in _VISIBLE_TEXTS:
        for i in ids_by_text.get(text, ()):
            types[i] = TokenType.USER_DEFINED
    # These vocabularies use the same text inside of an answer.
    ends_harmony = "<|call|>" in ids_by_text and "<|return|>" in ids_by_text
    calls = "<|call|>" in ids_by_text or "<|calls|>" in ids_by_text
    if ends_harmony or (calls and "<|flush|>" in ids_by_text):
        _exclude(ids_by_text.get("<|end|>", []), TokenType.USER_DEFINED, end_ids, types)
    if "<|tool_response>" in ids_by_text:
        _exclude(ids_by_text.get("</s>", []), TokenType.NORMAL, end_ids, types)
    return end_ids


def _exclude(ids: list[int], kind: TokenType, end_ids: set[int], types: list[int]) -> None:
    """Take tokens from those that end a generation, and give them another type."""
    end_ids.difference_update(ids)
    for i in ids:
        types[i] = kind


def _unique_texts(texts: list[str], types: list[int]) -> list[str]:
    """Return the texts of all tokens, with stand-ins for empty texts and repeated ones.

    Of tokens with the same text, the last one that is never split keeps it, or else the last one.
    """
    owners: dict[str, int] = {}
    for i, text in enumerate(texts):
        owner = owners.get(text)
        if owner is None or types[i] in _SPECIAL_TYPES or types[owner] not in _SPECIAL_TYPES:
            owners[text] = i
    return [
        text if text and owners[text] == i else f"{text}{_FIRST_STAND_IN}{i}{_LAST_STAND_IN}"
        for i, text in enumerate(texts)
    ]
