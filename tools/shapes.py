"""Models of real sizes with random weights, to measure speed without downloading any.

Speed and memory do not depend on the values of weights. Sizes are those of the published
configurations.
"""

from typing import Any

from glass_mlx import GlobalPrior
from glass_mlx.models import find_ffns, fingerprint

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, llama, qwen3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

_NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_MODULES = {"llama": llama, "qwen3": qwen3, "gemma3_text": gemma3_text}

# Architecture, layers, hidden size, neurons, heads, key-value heads, their size, tokens, tied.
SHAPES: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "llama-3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3.2-3b": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "mistral-7b": ("llama", 32, 4096, 14336, 32, 8, 128, 32768, False),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-4b": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, True),
    "gemma-3-4b": ("gemma3_text", 34, 2560, 10240, 8, 4, 256, 262144, True),
}


def random_model(
    name: str, dtype: str, bits: int | None, group_size: int, mode: str, lazy: bool = False
) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: a key of `SHAPES`.
        dtype: "float16", "bfloat16" or "float32".
        bits: of quantized weights; None for floats.
        group_size: of quantized weights.
        mode: of quantization, as in `mx.quantize`.
        lazy: make no weights before they are used.
    """
    mx.random.seed(0)  # so that weights that are made anew are the same
    kind, *values = SHAPES[name]
    config = dict(zip(_NAMES, values, strict=True)) | {
        "model_type": kind,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    }
    module = _MODULES[kind]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    if bits is not None:
        nn.quantize(model, group_size, bits, mode=mode)
    for _, array in () if lazy else tree_flatten(model.parameters()):
        mx.eval(array)  # one by one, so that little is held
    model.eval()
    return model


def random_prior(model: nn.Module) -> GlobalPrior:
    """A prior of random scores."""
    generator = np.random.default_rng(0)
    scores = {ffn.path: generator.random(ffn.width, dtype=np.float32) for ffn in find_ffns(model)}
    return GlobalPrior({"griffin": scores}, fingerprint(model), {})


def numbers_tokenizer(size: int) -> TokenizerWrapper:
    """A tokenizer whose tokens are numbers, and that ends nothing."""
    vocabulary = {str(n): n for n in range(size)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="0"))
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words))
