"""Build a Hugging Face tokenizer from the metadata of a GGUF file.

Two families are known: byte-level BPE ("gpt2" in GGUF), whose pre-tokenizer is chosen by name,
and SentencePiece BPE ("llama"), whose merges follow from the scores of its pieces.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

Get = Callable[[str, Any], Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> Regex:
    """The word pattern of GPT-4's descendants; `digits` says how many digits stay together."""
    return Regex(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_TEKKEN = Regex(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: Regex) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# What cuts text into words before the merges, by the name in `tokenizer.ggml.pre`.
_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_SMOLLM = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]
_LLAMA3 = _split(_words(r"\p{N}{1,3}"))
_QWEN2 = _split(_words(r"\p{N}"))
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _split(_TEKKEN),
}
# In these a piece that is a whole word is taken as it is, before any merge.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}
_NFC = {"qwen2", "deepseek-r1-qwen"}

# Tokens that end a turn; files often name only the one that ends a document.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")


def _byte_level(get: Get, vocabulary: dict[str, int]) -> Tokenizer:
    name = get("tokenizer.ggml.pre", None)
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"its pre-tokenizer {name!r} is not known; known are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges_from_scores(
    vocabulary: dict[str, int], scores: list[float], mergeable: set[str]
) -> list[tuple[str, str]]:
    """List the pairs that form a piece, best piece first, as SentencePiece would join them."""
    merges = []
    for piece in mergeable:
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [
            (-scores[vocabulary[piece]], vocabulary[left], vocabulary[right], left, right)
            for left, right in pairs
            if left in mergeable and right in mergeable
        ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _sentencepiece(
    get: Get, vocabulary: dict[str, int], types: list[int], unknown: str | None
) -> Tokenizer:
    scores = get("tokenizer.ggml.scores", None)
    if scores is None:
        raise ValueError("its SentencePiece vocabulary has no scores")
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    mergeable = {piece for piece, i in vocabulary.items() if types[i] == TokenType.NORMAL}
    merges = _merges_from_scores(vocabulary, scores, mergeable)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def write_tokenizer(get: Get, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json for a GGUF file.

    Args:
        get: returns the metadata's value of a key, or the default given with it.
        folder: where to write.

    Returns:
        The token ids that belong into config.json: `bos_token_id` and `eos_token_id`.

    Raises:
        ValueError: if the tokenizer is of a kind that is not known.
    """
    tokens, model = get("tokenizer.ggml.tokens", None), get("tokenizer.ggml.model", None)
    if not tokens:
        raise ValueError("it has no tokenizer")
    types = get("tokenizer.ggml.token_type", None) or [TokenType.NORMAL] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    named = {
        name: get(f"tokenizer.ggml.{key}_token_id", None)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    special = {f"{name}_token": tokens[i] for name, i in named.items() if i is not None}
    if model == "gpt2":
        tokenizer = _byte_level(get, vocabulary)
    elif model == "llama":
        tokenizer = _sentencepiece(get, vocabulary, types, special.get("unk_token"))
    else:
        raise ValueError(f"its tokenizer of kind {model!r} is not known")

    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    adds_bos = get("tokenizer.ggml.add_bos_token", model == "llama")
    if adds_bos and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, named["bos"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": get(f"{get('general.architecture', '')}.context_length", None),
        "chat_template": get("tokenizer.chat_template", None),
    }
    config = {k: v for k, v in (config | special).items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    ends = [named["eos"], get("tokenizer.ggml.eot_token_id", None)]
    turn_ends = [vocabulary[token] for token in _TURN_ENDS if token in vocabulary]
    ends += [i for i in turn_ends if types[i] == TokenType.CONTROL]
    return {
        "bos_token_id": named["bos"],
        "eos_token_id": sorted({i for i in ends if i is not None}),
    }
