"""Small valid GGUF files of every architecture, tokenizer and quantization that can be read."""

from collections.abc import Callable, Sequence
from typing import Any

from fuzzing.gguf_file import ALIGNMENT, Array, Entry, GGUFFile, TensorInfo

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from tokenizers.pre_tokenizers import ByteLevel

_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
_PLAIN = (*_FLOATS, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
_K_QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
# Where a block of a K format holds its half-precision scales.
_K_SCALES = {Kind.Q4_K: slice(0, 4), Kind.Q5_K: slice(0, 4), Kind.Q6_K: slice(208, 210)}

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_LETTERS = sorted(ByteLevel.alphabet())
_MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w")
_WORDS = [*_LETTERS, *(merge.replace(" ", "") for merge in _MERGES), *_SPECIAL]
_PIECES = [
    *("<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁w"),
]

Seed = Callable[[], GGUFFile]


def _number(key: str, value: float | bool) -> Entry:
    kind = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32}[type(value)]
    return Entry(key.encode(), kind, value)


def _text(key: str, value: str) -> Entry:
    return Entry(key.encode(), Type.STRING, value.encode())


def _list(key: str, kind: Type, items: Sequence[Any]) -> Entry:
    items = [item.encode() if isinstance(item, str) else item for item in items]
    return Entry(key.encode(), Type.ARRAY, Array(kind, items))


def _bpe_tokenizer() -> list[Entry]:
    return [
        _text("tokenizer.ggml.model", "gpt2"),
        _text("tokenizer.ggml.pre", "smollm"),
        _list("tokenizer.ggml.tokens", Type.STRING, _WORDS),
        _list("tokenizer.ggml.token_type", Type.INT32, [1] * (len(_WORDS) - 4) + [3] * 4),
        _list("tokenizer.ggml.merges", Type.STRING, _MERGES),
        _number("tokenizer.ggml.bos_token_id", _WORDS.index("<s>")),
        _number("tokenizer.ggml.eos_token_id", _WORDS.index("</s>")),
        _number("tokenizer.ggml.unknown_token_id", _WORDS.index("</s>")),
        _number("tokenizer.ggml.padding_token_id", _WORDS.index("</s>")),
        _number("tokenizer.ggml.add_bos_token", True),
        _text("tokenizer.chat_template", _TEMPLATE),
    ]


def _sentencepiece_tokenizer() -> list[Entry]:
    kinds = [2, 3, 3, 3, 3] + [6] * 256 + [1] * (len(_PIECES) - 261)
    return [
        _text("tokenizer.ggml.model", "llama"),
        _list("tokenizer.ggml.tokens", Type.STRING, _PIECES),
        _list("tokenizer.ggml.scores", Type.FLOAT32, [-float(i) for i in range(len(_PIECES))]),
        _list("tokenizer.ggml.token_type", Type.INT32, kinds),
        _number("tokenizer.ggml.bos_token_id", 1),
        _number("tokenizer.ggml.eos_token_id", 2),
        _number("tokenizer.ggml.unknown_token_id", 0),
        _number("tokenizer.ggml.add_space_prefix", False),
    ]


def _hparams(architecture: str, layers: int, hidden: int, ffn: int, head: int) -> list[Entry]:
    return [
        _text("general.architecture", architecture),
        _text("general.name", "tiny"),
        _number("general.file_type", 1),
        _number(f"{architecture}.block_count", layers),
        _number(f"{architecture}.context_length", 512),
        _number(f"{architecture}.embedding_length", hidden),
        _number(f"{architecture}.feed_forward_length", ffn),
        _number(f"{architecture}.attention.head_count", hidden // head),
        _number(f"{architecture}.attention.head_count_kv", hidden // head // 2),
        _number(f"{architecture}.attention.key_length", head),
        _number(f"{architecture}.attention.value_length", head),
        _number(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5),
        _number(f"{architecture}.rope.freq_base", 20000.0),
        _number(f"{architecture}.rope.dimension_count", head),
        _number("general.quantization_version", 2),
    ]


def _blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return the bytes of a random tensor, (rows, bytes per row)."""
    if kind not in _K_QUANTS:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        return gguf.quantize(values, kind).reshape(shape[0], -1).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    scales = _K_SCALES[kind]
    halves = np.full((len(blocks), (scales.stop - scales.start) // 2), 1e-3, np.float16)
    blocks[:, scales] = halves.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _shapes(layers: int, hidden: int, ffn: int, head: int, rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama model's tensors, in the order (outputs, inputs)."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (rows, hidden)}
    for n in range(layers):
        layer = {
            "attn_norm": (hidden,),
            "attn_q": (hidden // head * head, hidden),
            "attn_k": (hidden // head // 2 * head, hidden),
            "attn_v": (hidden // head // 2 * head, hidden),
            "attn_output": (hidden, hidden // head * head),
            "ffn_norm": (hidden,),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"output_norm.weight": (hidden,)}


def _file(
    entries: list[Entry], shapes: dict[str, tuple[int, ...]], kinds: Sequence[Kind], seed: int
) -> GGUFFile:
    """Make a file of random tensors; matrices take the formats in turn, vectors are float32."""
    rng, data, tensors, matrices = np.random.default_rng(seed), bytearray(), [], 0
    for name, shape in shapes.items():
        kind = Kind.F32
        if len(shape) == 2:
            kind, matrices = kinds[matrices % len(kinds)], matrices + 1
        if name.endswith("norm.weight"):
            block = (1 + rng.normal(0, 0.1, shape)).astype(np.float32).tobytes()
        elif len(shape) == 1:
            block = rng.normal(0, 0.1, shape).astype(np.float32).tobytes()
        else:
            block = _blocks(kind, shape, rng).tobytes()
        tensors.append(TensorInfo(name.encode(), list(reversed(shape)), kind, len(data)))
        data += block + bytes(-len(block) % ALIGNMENT)
    return GGUFFile(entries, tensors, bytes(data))


def llama() -> GGUFFile:
    """Make a Llama model in all formats without super-blocks."""
    shapes = _shapes(2, 64, 128, 16, len(_WORDS) + 3) | {"output.weight": (len(_WORDS) + 3, 64)}
    return _file(_hparams("llama", 2, 64, 128, 16) + _bpe_tokenizer(), shapes, _PLAIN, 1)


def llama_k() -> GGUFFile:
    """Make a Llama model with super-blocks and Llama 3's rotary frequency factors."""
    file = _file(
        _hparams("llama", 1, 256, 256, 64) + _bpe_tokenizer(),
        _shapes(1, 256, 256, 64, len(_WORDS)),
        _K_QUANTS,
        2,
    )
    wavelength = 2 * np.pi * 20000.0 ** (np.arange(0, 64, 2) / 64)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    file.tensors.append(TensorInfo(b"rope_freqs.weight", [32], Kind.F32, len(file.data)))
    file.data += factors.tobytes()
    return file


def qwen2() -> GGUFFile:
    """Make a Qwen 2 model, which has biases, with YaRN scaling."""
    shapes = _shapes(2, 64, 128, 16, len(_WORDS))
    for n in range(2):
        shapes |= {f"blk.{n}.attn_{q}.bias": (64 if q == "q" else 32,) for q in "qkv"}
    entries = [
        *_hparams("qwen2", 2, 64, 128, 16),
        _text("qwen2.rope.scaling.type", "yarn"),
        _number("qwen2.rope.scaling.factor", 4.0),
        _number("qwen2.rope.scaling.original_context_length", 128),
        *_bpe_tokenizer(),
    ]
    return _file(entries, shapes, (Kind.Q8_0, Kind.F16), 3)


def gemma3() -> GGUFFile:
    """Make a Gemma 3 model, which has further norms and a SentencePiece vocabulary."""
    shapes = _shapes(2, 64, 128, 16, len(_PIECES))
    for n in range(2):
        shapes |= {f"blk.{n}.attn_{part}_norm.weight": (16,) for part in "qk"}
        shapes |= {f"blk.{n}.{part}_norm.weight": (64,) for part in ("post_attention", "post_ffw")}
    entries = [
        *_hparams("gemma3", 2, 64, 128, 16),
        _number("gemma3.attention.sliding_window", 8),
        _number("gemma3.attention.sliding_window_pattern", 2),
        *_sentencepiece_tokenizer(),
    ]
    return _file(entries, shapes, (Kind.Q4_0, Kind.BF16), 4)


SEEDS: dict[str, Seed] = {f.__name__: f for f in (llama, llama_k, qwen2, gemma3)}
