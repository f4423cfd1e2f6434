"""Models of real sizes with random weights, for measuring speed without a download.

Speed and memory do not depend on the values of the weights. The sizes are those of the published
configurations.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from glass_mlx.config import GlassConfig
from glass_mlx.models import find_head, named_arrays
from glass_mlx.prior.file import GlobalPrior, packaged_priors, prior_files
from glass_mlx.session import Session

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import gemma3_text, gpt_oss, llama, qwen3, qwen3_moe
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

_MODULES = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma3_text": gemma3_text,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}


@dataclass(frozen=True)
class Shape:
    """The architecture and sizes of a model, under the names of its configuration file.

    `experts` has further entries of mixtures of experts.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    experts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The entries of the configuration file."""
        sizes = asdict(self)
        return {name: value for name, value in sizes.items() if name != "experts"} | {
            **sizes["experts"]
        }


_QWEN3_EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_GPT_OSS_EXPERTS = {"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128}

# Architecture, layers, hidden size, neurons, heads, key-value heads, head size, vocabulary, tied.
SHAPES = {
    "smollm2-135m": Shape("llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3.2-3b": Shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "mistral-7b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 32768, False),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "gemma-3-1b": Shape("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, True),
    "gemma-3-4b": Shape("gemma3_text", 34, 2560, 10240, 8, 4, 256, 262144, True),
    "qwen3-30b-a3b": Shape("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, False, _QWEN3_EXPERTS),
    "gpt-oss-20b": Shape("gpt_oss", 24, 2880, 2880, 64, 8, 64, 201088, False, _GPT_OSS_EXPERTS),
}


def random_model(
    name: str,
    dtype: str,
    bits: int | None,
    group_size: int,
    mode: str,
    lazy: bool = False,
    layers: int | None = None,
) -> nn.Module:
    """Build a model with random weights, the same in every call.

    Args:
        name: a key of `SHAPES`.
        dtype: "float16", "bfloat16" or "float32".
        bits: bits of quantized weights; None for floats.
        group_size: the number of weights per quantization group.
        mode: the quantization mode; see `mx.quantize`.
        lazy: whether to compute each weight when it is first used.
        layers: the number of layers, to fit a large model's layers into less memory. Default: all.
    """
    mx.random.seed(0)
    shape = SHAPES[name]
    if layers is not None:
        shape = replace(shape, num_hidden_layers=layers)
    config = shape.config | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    }
    module = _MODULES[shape.model_type]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    _predict_few_tokens(model)
    if bits is not None:
        nn.quantize(model, group_size, bits, mode=mode)
    for _, array in () if lazy else named_arrays(model):
        mx.eval(array)  # one at a time, to hold few intermediate arrays
    model.eval()
    return model


def _predict_few_tokens(model: nn.Module) -> None:
    """Scale the head's rows, so that predictions stay within the first sixteenth of the vocabulary.

    Other random weights predict every token alike, so that no draft would be right.
    """
    head = find_head(model)
    assert head is not None
    weight = head.layer.weight
    is_likely = mx.arange(head.size)[:, None] < _likely_tokens(head.size)
    head.layer.weight = weight * mx.where(is_likely, 30, 0.5).astype(weight.dtype)


def _likely_tokens(size: int) -> int:
    """Return the number of tokens that random weights predict, of a vocabulary's size."""
    return size // 16


def random_prior(model: nn.Module, down_policy: str) -> GlobalPrior:
    """Build a prior with random scores, and with the curves of the built-in model.

    What slicing costs is meaningless for random weights, but decides how much is kept.
    """
    session, generator = Session.of(model), np.random.default_rng(0)
    scores = {
        path: generator.random(shape, dtype=np.float32)
        for path, shape in session.whole_shapes.items()
    }
    (packaged,) = prior_files(packaged_priors())
    curves = GlobalPrior.load(packaged).about["curves"][0]
    conditions = session.conditions(GlassConfig(down_policy=down_policy))
    about = {"curves": [curves | {"conditions": conditions}]}
    vocabulary = generator.random(session.vocabulary_size, dtype=np.float32)
    vocabulary[_likely_tokens(len(vocabulary)) :] *= 1e-3
    vocabulary /= vocabulary.sum()
    stacks = {path: shape[0] for path, shape in session.whole_shapes.items() if len(shape) == 2}
    routed = {path: np.full(count, 256, np.float32) for path, count in stacks.items()}
    weights = session.fingerprint
    return GlobalPrior({"griffin": scores}, weights, about, vocabulary=vocabulary, routed=routed)


def numbers_tokenizer(size: int) -> TokenizerWrapper:
    """Build a tokenizer whose tokens are the numbers below a size, without an end-of-text token.

    Each is a line, because mlx-lm's detokenizer decodes the last line again for every token.
    """
    vocabulary = {f"{n}\n": n for n in range(size)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="0\n"))
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words))
