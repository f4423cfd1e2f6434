"""Build a Hugging Face tokenizer from the metadata of a GGUF file.

Two families are supported: byte-level BPE ("gpt2" in GGUF), whose pre-tokenizer is looked up by
name, and SentencePiece BPE ("llama"), whose merges follow from the scores of its pieces.
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

# Returns the value of a metadata key, or the given default.
Get = Callable[[str, Any], Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _word_pattern(digits: str) -> Regex:
    """Return the word pattern of GPT-4's descendants; `digits` matches the digits of one word."""
    return Regex(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_TEKKEN_PATTERN = Regex(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_at(pattern: Regex) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps that split text into the pattern's words and map bytes to characters."""
    return [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# Steps that split text into words before the merges, by the name in `tokenizer.ggml.pre`.
_GPT2: list[pre_tokenizers.PreTokenizer] = [
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
]
_SMOLLM = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]
_LLAMA3 = _split_at(_word_pattern(r"\p{N}{1,3}"))
_QWEN2 = _split_at(_word_pattern(r"\p{N}"))
PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _split_at(_TEKKEN_PATTERN),
}
# With these pre-tokenizers a word that is a token is not split and merged again.
_IGNORING_MERGES = {"llama-bpe", "llama3", "llama-v3", "tekken"}
# With these pre-tokenizers text is normalized to Unicode's form NFC.
_NFC = {"qwen2", "deepseek-r1-qwen"}

# Tokens that end a turn. The metadata often names only the token that ends a document.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")

# Names of special tokens in transformers, and in the keys of GGUF metadata.
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(get: Get, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json for a GGUF file.

    Args:
        get: returns the value of a metadata key, or the given default.
        folder: an existing folder.

    Returns:
        Token ids for config.json: `bos_token_id` and `eos_token_id`.

    Raises:
        ValueError: if the file has no tokenizer, or an unsupported one.
    """
    tokens = get("tokenizer.ggml.tokens", None)
    if not tokens:
        raise ValueError("it has no tokenizer")
    types = get("tokenizer.ggml.token_type", None) or [TokenType.NORMAL] * len(tokens)
    special_ids = {
        name: get(f"tokenizer.ggml.{key}_token_id", None) for name, key in _SPECIAL_TOKENS.items()
    }
    special_tokens = {
        f"{name}_token": tokens[i] for name, i in special_ids.items() if i is not None
    }
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = _build_tokenizer(get, vocabulary, types, special_tokens.get("unk_token"))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    adds_bos = get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model", None) == "llama")
    if adds_bos and "bos_token" in special_tokens:
        bos = special_tokens["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, special_ids["bos"])],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": get(f"{get('general.architecture', '')}.context_length", None),
        "chat_template": get("tokenizer.chat_template", None),
    }
    config = {key: value for key, value in (config | special_tokens).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    turn_ends = {vocabulary[token] for token in _TURN_ENDS if token in vocabulary}
    eos_ids = {i for i in turn_ends if types[i] == TokenType.CONTROL}
    eos_ids |= {special_ids["eos"], get("tokenizer.ggml.eot_token_id", None)} - {None}
    return {"bos_token_id": special_ids["bos"], "eos_token_id": sorted(eos_ids)}


def _build_tokenizer(
    get: Get, vocabulary: dict[str, int], types: list[int], unknown: str | None
) -> Tokenizer:
    """Build the tokenizer, without added tokens and post-processor.

    Args:
        get: see `write_tokenizer`.
        vocabulary: the ids of all tokens.
        types: the `TokenType` of every token, by id.
        unknown: the token for unknown characters.
    """
    model = get("tokenizer.ggml.model", None)
    if model == "gpt2":
        return _byte_level_bpe(get, vocabulary)
    if model == "llama":
        return _sentencepiece_bpe(get, vocabulary, types, unknown)
    raise ValueError(f"its tokenizer of kind {model!r} is not known")


def _byte_level_bpe(get: Get, vocabulary: dict[str, int]) -> Tokenizer:
    name = get("tokenizer.ggml.pre", None)
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"its pre-tokenizer {name!r} is not known, but only {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _IGNORING_MERGES))
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(
    get: Get, vocabulary: dict[str, int], types: list[int], unknown: str | None
) -> Tokenizer:
    scores = get("tokenizer.ggml.scores", None)
    if scores is None:
        raise ValueError("its SentencePiece vocabulary has no scores")
    has_prefix = get("tokenizer.ggml.add_space_prefix", True)
    mergeable = {piece for piece, i in vocabulary.items() if types[i] == TokenType.NORMAL}
    merges = _merges_from_scores(vocabulary, scores, mergeable)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Prepend("▁")] * has_prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * has_prefix)
    return tokenizer


def _merges_from_scores(
    vocabulary: dict[str, int], scores: list[float], mergeable: set[str]
) -> list[tuple[str, str]]:
    """List the pairs that form a piece, best piece first, as SentencePiece joins them."""
    merges = []
    for piece in mergeable:
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [
            (-scores[vocabulary[piece]], vocabulary[left], vocabulary[right], left, right)
            for left, right in pairs
            if left in mergeable and right in mergeable
        ]
    return [(left, right) for *_, left, right in sorted(merges)]
