"""Build a Hugging Face tokenizer from the metadata of a GGUF file.

Two families are supported: byte-level BPE ("gpt2" in GGUF), whose pre-tokenizer is looked up by
name, and SentencePiece BPE ("llama"), whose merges follow from the scores of its pieces. What is
added to text, and when, follows `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

import json
import re
from pathlib import Path
from typing import Any

from glass_mlx.checkpoints.gguf_metadata import GGUFError, Metadata, shorten, warn
from glass_mlx.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from glass_mlx.checkpoints.gguf_vocabulary import (
    STAND_IN_PATTERN,
    Vocabulary,
    check_length,
    read_vocabulary,
)

import numpy as np
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

# The families by their names in `tokenizer.ggml.model`.
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"

# Names of special tokens in transformers, and in the keys of GGUF metadata.
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# Types of tokens that are never split, and whether they are left out of text.
_ADDED_TYPES = {
    TokenType.CONTROL: True,
    TokenType.UNKNOWN: True,
    TokenType.USER_DEFINED: False,
}


def write_tokenizer(metadata: Metadata, folder: Path, rows: int | None = None) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json for a GGUF file.

    Args:
        metadata: the metadata of the file.
        folder: an existing folder.
        rows: the number of rows of the embedding. Default: one for each token.

    Returns:
        Token ids for config.json: `bos_token_id` and `eos_token_id`.

    Raises:
        GGUFError: if the file has no tokenizer, an unsupported one, or more tokens than rows.
    """
    vocabulary = read_vocabulary(metadata)
    count = len(vocabulary.tokens)
    if rows is not None and count > rows:
        raise GGUFError(f"its tokenizer has {count} tokens, but its embedding has {rows} rows")
    suppressed = "tokenizer.ggml.suppress_tokens"
    if suppressed in metadata and np.size(metadata.value(suppressed)):
        raise GGUFError(f"it has {suppressed}, which is not supported")
    model = metadata.text("tokenizer.ggml.model")
    if model == _BYTE_LEVEL:
        kind = _find_pre_tokenizer(metadata)
        tokenizer = _byte_level_bpe(metadata, vocabulary, kind)
        adds_bos = kind.adds_bos
    elif model == _SENTENCEPIECE:
        tokenizer = _sentencepiece_bpe(metadata, vocabulary)
        adds_bos = True
    else:
        raise GGUFError(f"its tokenizer of kind {model!r} is not known")
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, metadata, vocabulary, adds_bos)
    if vocabulary.has_stand_ins or count < (rows or count):
        # Any other decoder also keeps mlx-lm from its faster detokenizers, which need a text for
        # every id.
        remove = decoders.Replace(Regex(STAND_IN_PATTERN), "")
        tokenizer.decoder = decoders.Sequence([remove, tokenizer.decoder])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    config = _tokenizer_config(metadata, vocabulary)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {
        "bos_token_id": vocabulary.special_ids.get("bos"),
        "eos_token_id": vocabulary.end_ids,
    }


def _tokenizer_config(metadata: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    length = f"{metadata.text('general.architecture', '')}.context_length"
    if length in metadata:
        config["model_max_length"] = metadata.integer(length)
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    for name, key in _SPECIAL_TOKENS.items():
        if key in vocabulary.named:
            config[f"{name}_token"] = vocabulary.tokens[vocabulary.special_ids[key]]
    return config


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Add the tokens that are never split."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=_ADDED_TYPES[TokenType(kind)], normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in _ADDED_TYPES
        ]
    )


def _add_ends(
    tokenizer: Tokenizer, metadata: Metadata, vocabulary: Vocabulary, adds_bos: bool
) -> None:
    """Make the tokenizer add the tokens that text starts and ends with.

    Args:
        tokenizer: the tokenizer.
        metadata: the metadata of the file.
        vocabulary: the tokens.
        adds_bos: whether text starts with BOS, if the file does not say.

    Raises:
        GGUFError: if a token is to be added that the file does not have.
    """
    used = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{name}_token"
        if not metadata.flag(key, default):
            continue
        if name not in vocabulary.special_ids:
            raise GGUFError(f"it adds the token {name} to text, but has no such token")
        used.append(name)
    if not used:
        return
    before, after = ["bos"] * ("bos" in used), ["eos"] * ("eos" in used)
    special_tokens = [
        {"id": name, "ids": [i], "tokens": [vocabulary.tokens[i]]}
        for name in used
        for i in [vocabulary.special_ids[name]]
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=special_tokens,
    )


def _find_pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text("tokenizer.ggml.pre", "")
    if not name:
        warn("tokenizer.ggml.pre is missing; using 'default', which may split text differently")
    kind = PRE_TOKENIZERS.get(name or "default")
    if kind is None:
        raise GGUFError(
            f"its pre-tokenizer {name!r} is not known, but only {', '.join(PRE_TOKENIZERS)}"
        )
    return kind


def _byte_level_bpe(metadata: Metadata, vocabulary: Vocabulary, kind: PreTokenizer) -> Tokenizer:
    ids = vocabulary.ids
    merges = _read_merges(metadata, ids)
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=kind.ignores_merges))
    if kind.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(kind.steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_merges(metadata: Metadata, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that form another token, best pair first."""
    pairs = [tuple(merge.split(" ")) for merge in metadata.strings("tokenizer.ggml.merges")]
    merges = [
        (pair[0], pair[1])
        for pair in pairs
        if len(pair) == 2 and pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids
    ]
    if len(merges) < len(pairs):
        warn(f"{len(pairs) - len(merges)} of tokenizer.ggml.merges do not name tokens; ignored")
    return merges


def _sentencepiece_bpe(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if scores is None:
        raise GGUFError("its SentencePiece vocabulary has no scores")
    check_length("tokenizer.ggml.scores", scores, len(vocabulary.tokens))
    if scores.dtype.kind != "f" or np.isnan(scores).any():
        raise GGUFError("its tokenizer.ggml.scores are not all floating-point numbers")
    for token in vocabulary.tokens:
        if token.startswith("<0x") and not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            raise GGUFError(f"its token {shorten(token)} is not a byte in hexadecimal")
    has_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = None
    if "unknown" in vocabulary.named:
        unknown = vocabulary.tokens[vocabulary.special_ids["unknown"]]
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Prepend("▁")] * has_prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * has_prefix)
    return tokenizer


def _merges_from_scores(vocabulary: Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """List the pairs that form a piece, best piece first, as SentencePiece joins them."""
    mergeable = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == TokenType.NORMAL
    }
    # Few lengths occur, so that even a very long piece is cut in few places.
    lengths = sorted({len(piece) for piece in mergeable})
    merges = []
    for piece, i in mergeable.items():
        for length in lengths:
            if length >= len(piece):
                break
            left, right = piece[:length], piece[length:]
            if left in mergeable and right in mergeable:
                merges.append((-scores[i], mergeable[left], mergeable[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
