"""Small valid model folders, priors and prompt caches, and the models that they belong to."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from glass_mlx import (
    GlassConfig,
    GlobalPrior,
    Session,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from glass_mlx.models import find_ffns, fingerprint
from glass_mlx.models.architectures import tiny_model
from glass_mlx.prior.file import FILE_NAME, packaged_priors, prior_files

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import llama, qwen3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# The contents of files by name.
Files = dict[str, bytes]

CACHE_FILE, STATISTICS_FILE = "talk.safetensors", "talk.glass.safetensors"
PROMPT = [1, 7, 3, 200, 9, 54, 21]
SCHEDULE: dict[str, Any] = {"warmup": 2, "refresh": 2, "dense_every": 2}
GENERATION: dict[str, Any] = SCHEDULE | {"prior": False, "density": 0.5, "vocabulary": 0.5}

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_MERGES = [("h", "e"), ("l", "l"), ("he", "ll")]
# One less than the rows of the embedding.
_ROWS = 264

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": _ROWS,
    "max_position_embeddings": 512,
    "rope_theta": 20000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 259,
    "eos_token_id": [260, 262],
    "torch_dtype": "float32",
}
_QWEN3_CONFIG = _CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "tie_word_embeddings": True,
    "rope_scaling": None,
    "quantization": {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
    },
}


def _bpe() -> Tokenizer:
    """Return a byte-level tokenizer of 256 bytes, three merges and four special tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, _MERGES)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, _MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@cache
def tokenizer() -> TokenizerWrapper:
    """Return the tokenizer of the models that priors and prompt caches belong to."""
    fast = PreTrainedTokenizerFast(tokenizer_object=_bpe(), bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    return TokenizerWrapper(fast)


def _json(tree: Any) -> bytes:
    return json.dumps(tree, indent=2).encode()


def _safetensors(arrays: dict[str, mx.array]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        mx.save_safetensors(file, arrays, {"format": "mlx"})
        return Path(file).read_bytes()


def _folder(model: nn.Module, config: dict[str, Any], shards: int) -> Files:
    """Return the files of a model folder, with the weights in one file or several."""
    arrays = sorted(tree_flatten(model.parameters()))
    parts = [dict(arrays[n::shards]) for n in range(shards)]
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": sum(a.nbytes for _, a in arrays)}, "weight_map": weight_map}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    files = {name: _safetensors(part) for name, part in zip(names, parts, strict=True)}
    return files | {
        "model.safetensors.index.json": _json(index),
        "config.json": _json(config),
        "generation_config.json": _json({"eos_token_id": [260, 262], "temperature": 0.7}),
        "tokenizer.json": _bpe().to_str().encode(),
        "tokenizer_config.json": _json(tokenizer_config),
    }


@cache
def folders() -> dict[str, Files]:
    """Make a Llama folder in float32 and a Qwen 3 folder with quantized weights in two files."""
    mx.random.seed(5)
    plain = llama.Model(llama.ModelArgs.from_dict(_CONFIG))
    quantized = qwen3.Model(qwen3.ModelArgs.from_dict(_QWEN3_CONFIG))
    layers = _QWEN3_CONFIG["quantization"]
    assert isinstance(layers, dict)
    nn.quantize(
        quantized,
        32,
        4,
        class_predicate=lambda p, m: hasattr(m, "to_quantized") and layers.get(p, True),
    )
    return {
        "llama": _folder(plain, _CONFIG, shards=1),
        "qwen3": _folder(quantized, _QWEN3_CONFIG, shards=2),
    }


@cache
def model(name: str) -> nn.Module:
    """Return the model that the seed of a prior or a prompt cache belongs to."""
    return tiny_model(name.removesuffix(" by mlx-lm"), seed=6)


@cache
def priors() -> dict[str, Files]:
    """Make the prior of a model, with the description of the built-in model's prior."""
    dense, rng = model("llama"), np.random.default_rng(7)
    about = dict(GlobalPrior.load(next(prior_files(packaged_priors()))).about)
    about["stability"] = {
        name: {measure: dict([*by_ffn.items()][:2]) for measure, by_ffn in measures.items()}
        for name, measures in about["stability"].items()
    }
    about["whole"] = [find_ffns(dense)[0].path]
    conditions = Session(dense).conditions(GlassConfig(**SCHEDULE))
    about["curves"] = [about["curves"][0] | {"conditions": conditions}]
    groups = [{f.path: rng.random(f.width, np.float32) for f in find_ffns(dense)} for _ in range(4)]
    names = ("activation", "griffin")
    prior = GlobalPrior(
        dict(zip(names, groups[:2], strict=True)),
        fingerprint(dense),
        about,
        dict(zip(names, groups[2:], strict=True)),
        rng.random(256, np.float32),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE_NAME
        prior.save(file)
        return {"llama": {FILE_NAME: file.read_bytes()}}


@cache
def caches() -> dict[str, Files]:
    """Make prompt caches of plain, rotating and recurrent layers, and one by mlx-lm."""
    seeds = {name: _cache_files(name) for name in ("llama", "gemma3_text", "lfm2")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CACHE_FILE
        layers = mlx_lm_cache.make_prompt_cache(model("llama"))
        mx.eval(model("llama")(mx.array([PROMPT]), cache=layers))
        mlx_lm_cache.save_prompt_cache(str(file), layers, {"model": "tiny"})
        return seeds | {"llama by mlx-lm": {CACHE_FILE: file.read_bytes()}}


def _cache_files(name: str) -> Files:
    dense = model(name)
    prompt_cache = make_prompt_cache(dense)
    options = GENERATION | {"prompt_cache": prompt_cache}
    for _ in stream_generate(dense, tokenizer(), PROMPT, 12, **options):
        pass
    metadata = {
        "model": "tiny",
        "tokenizer_config": "{}",
        "messages": json.dumps(
            [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CACHE_FILE
        save_prompt_cache(file, prompt_cache, metadata)
        return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}
