"""How text is split into words before byte-level BPE, by the name in `tokenizer.ggml.pre`.

Names, patterns and flags follow `llama_vocab::impl::load` and `llm_tokenizer_bpe` in llama.cpp's
src/llama-vocab.cpp.
"""

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

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
_GPT2_PATTERN = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _split_at(*patterns: Regex) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps that split text by one pattern after another, and encode its bytes."""
    return [
        *(pre_tokenizers.Split(pattern, "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


class PreTokenizer(NamedTuple):
    """One of llama.cpp's ways to split text.

    Attributes:
        steps: they split text into words and map bytes to characters.
        adds_bos: whether text starts with the BOS token, if the file does not say.
        ignores_merges: whether a word that is a token stays whole, whatever the merges.
        is_nfc: whether text is first normalized to Unicode's form NFC. llama.cpp does not, but
            the original tokenizers do.
    """

    steps: list[pre_tokenizers.PreTokenizer]
    adds_bos: bool = False
    ignores_merges: bool = False
    is_nfc: bool = False


_GPT2 = PreTokenizer([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
_SMOLLM = PreTokenizer([pre_tokenizers.Digits(individual_digits=True), *_GPT2.steps])
_LLAMA3 = PreTokenizer(_split_at(_word_pattern(r"\p{N}{1,3}")), adds_bos=True, ignores_merges=True)
_QWEN2 = PreTokenizer(_split_at(_word_pattern(r"\p{N}")))
_DEFAULT = PreTokenizer(
    _split_at(
        Regex(r"[\p{P}\$\+<=>\^~\|]+"), _GPT2_PATTERN, Regex(r"\p{N}+"), Regex("[0-9][0-9][0-9]")
    )
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "trillion"),
        _GPT2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _SMOLLM,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(adds_bos=False, ignores_merges=False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2._replace(is_nfc=True)),
    **dict.fromkeys(("kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": PreTokenizer(_split_at(_TEKKEN_PATTERN), adds_bos=True, ignores_merges=True),
}
