"""Shared helpers: tiny models and their files, and the invariants of every sliceable model."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glass_mlx.config import GlassConfig
from glass_mlx.models import (
    DOWN_POLICIES,
    FFN,
    MeanCompensation,
    Routing,
    find_ffns,
    fingerprint,
    membership,
    with_modules,
    with_taps,
)
from glass_mlx.models.architectures import configuration, tiny_model
from glass_mlx.models.ffn import LAYOUTS
from glass_mlx.prior.file import GlobalPrior
from glass_mlx.selection import Selection
from glass_mlx.session import Session
from glass_mlx.slicing import SlicedModel, slice_model
from glass_mlx.statistics import STATISTICS, LocalStatistics, NeuronStatistics

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# A fast subset of the architectures. It covers plain, gated and fused FFNs, experts, windows and
# recurrent states.
FAST = ("llama", "gpt2", "phi3", "deepseek_v3", "gemma3_text", "falcon_h1")

# Quantization mode, group size, bits.
QUANTIZATION_MODES = [
    *(("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)),
    ("mxfp4", 32, 4),
    ("nvfp4", 16, 4),
    ("mxfp8", 32, 8),
]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for `tiny_model` with 256 tokens of one character each."""
    vocabulary = {chr(0x4E00 + i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=chr(0x4E01))


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '上' if m.role == 'user' else '下' }}{{ m.content }}不{% endfor %}"
    "{% if add_generation_prompt %}下{% endif %}"
)


def chat_tokenizer() -> TokenizerWrapper:
    """Return the letter tokenizer with a chat template: 上 user's turn 不 下 answer 不."""
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "不"
    tokenizer.chat_template = CHAT_TEMPLATE
    return TokenizerWrapper(tokenizer)


def save_tiny_folder(folder: Path, architecture: str = "llama", **quantization: Any) -> Path:
    """Save a tiny model, optionally quantized, and its tokenizer as an mlx-lm model folder."""
    folder.mkdir()
    model, config = tiny_model(architecture), configuration(architecture)
    if quantization:
        nn.quantize(model, **quantization)
        config["quantization"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    letter_tokenizer().save_pretrained(folder)
    return folder


def save_chat_folder(folder: Path) -> Path:
    """Save a tiny model that can chat, and its prior with curves."""
    save_tiny_folder(folder)
    prior_with_curves(tiny_model("llama")).save(folder / "glass_prior.safetensors")
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "不"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def add_adapters(model: nn.Module, kind: str, keys: list[str] | None = None) -> dict[str, Any]:
    """Add random adapters to a model in place, as mlx-lm does for training.

    Args:
        model: the model.
        kind: "lora" or "dora".
        keys: see `linear_to_lora_layers`. Default: all layers of all blocks.

    Returns:
        The contents of adapter_config.json.
    """
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    config = {"num_layers": 4, "fine_tune_type": kind, "lora_parameters": parameters}
    linear_to_lora_layers(model, 4, dict(parameters), use_dora=kind == "dora")
    mx.random.seed(3)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
        if "m" in module:
            module.m = module.m * (1 + 0.2 * mx.random.normal(module.m.shape))
    model.eval()
    return config


def save_adapters(
    folder: Path, model_folder: Path, kind: str, keys: list[str] | None = None
) -> str:
    """Save random adapters for a model's folder; return their folder."""
    folder.mkdir()
    model, _ = mlx_lm.load(str(model_folder))
    if kind == "full":
        config = {"num_layers": 4, "fine_tune_type": kind}
        model.layers[1].mlp.up_proj.scales = 1.5 * model.layers[1].mlp.up_proj.scales
        names = {"model.layers.1.mlp.up_proj.scales"}
    else:
        config = add_adapters(model, kind, keys)
        names = {
            path
            for path, _ in tree_flatten(model.parameters())
            if path.rsplit(".")[-1] in ("lora_a", "lora_b", "m")
        }
    weights = {path: a for path, a in tree_flatten(model.parameters()) if path in names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return str(folder)


# From mlx-lm's tensor names to llama.cpp's.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_GEMMA_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# From mlx-lm's model types to llama.cpp's architectures.
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}


def write_gguf(
    model: nn.Module,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    leave_out: str = "",
    tensors: dict[str, np.ndarray] | None = None,
    **metadata: Any,
) -> None:
    """Write a tiny model to a GGUF file as llama.cpp's converter does.

    Args:
        model: a model from `tiny_model`.
        file: the GGUF file to write.
        kind: the tensor format of matrices.
        leave_out: the name of a tensor to omit.
        tensors: additional tensors, in float32, or those that replace the model's.
        **metadata: additional metadata keys and values; a key with the value None is omitted.
    """
    architecture = GGUF_ARCHITECTURES[model.args.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    _add_gguf_hparams(writer, architecture, model.args)
    _add_gguf_tokenizer(writer)
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            _gguf_adder(writer, value)(key, value)
    for path, array in tree_flatten(model.parameters()):
        name = _gguf_tensor_name(path, architecture)
        if name == leave_out or name in (tensors or {}):
            continue
        values = _gguf_values(np.array(array), name, architecture, model.args)
        if values.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_adder(writer: gguf.GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    """Return the writer's function for values of a type."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    return adders[type(value)]


def _add_gguf_hparams(writer: gguf.GGUFWriter, architecture: str, args: Any) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    if architecture == "gemma3":
        writer.add_sliding_window(args.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", args.sliding_window_pattern)


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add a byte-level vocabulary of single bytes and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet[:253], "ab", "<s>", "</s>"])
    writer.add_token_types([1] * 254 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(254)
    writer.add_eos_token_id(255)


def _gguf_tensor_name(path: str, architecture: str) -> str:
    """Return llama.cpp's name of one of mlx-lm's parameters."""
    names = GGUF_GEMMA_NAMES if architecture == "gemma3" else GGUF_NAMES
    module, parameter = path.rsplit(".", 1)
    whole_path, _, in_layers = module.partition("model.layers.")
    layer, _, path_in_layer = in_layers.partition(".")
    prefix = f"blk.{layer}." if layer else ""
    return f"{prefix}{names[path_in_layer or whole_path]}.{parameter}"


def _gguf_values(values: np.ndarray, name: str, architecture: str, args: Any) -> np.ndarray:
    """Change a parameter's values to those that llama.cpp's converter writes."""
    tensor = name.split(".")[-2]
    if architecture == "gemma3" and tensor.endswith("norm"):
        return values + 1
    heads = {"attn_q": args.num_attention_heads, "attn_k": args.num_key_value_heads}
    if architecture == "llama" and tensor in heads:
        halves = values.reshape(heads[tensor], 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def made_prior(model: nn.Module, seed: int = 0) -> GlobalPrior:
    """Return a prior with random scores."""
    generator, ffns = np.random.default_rng(seed), find_ffns(model)
    scores, spread = (
        {f.path: generator.random(f.shape, np.float32) for f in ffns} for _ in range(2)
    )
    by_statistic = {"activation": scores, "griffin": {path: v**2 for path, v in scores.items()}}
    spreads = dict.fromkeys(by_statistic, spread)
    size = int(model(mx.array([[0]])).shape[-1])
    vocabulary = generator.random(size, np.float32) / size
    about, weights = {"model": "tiny"}, fingerprint(model)
    routed = {f.path: np.full(f.experts, 50, np.float32) for f in ffns if f.experts}
    return GlobalPrior(by_statistic, weights, about, spreads, vocabulary, routed)


def curve_record(model: nn.Module, config: GlassConfig | None = None) -> dict[str, Any]:
    """Return a record of curves, measured under the conditions of a configuration."""
    return {
        "density": {"shares": [0.25, 0.5, 0.75], "kl": [2.0, 0.5, 0.05]},
        "conditions": Session(model).conditions(config or GlassConfig()),
        "tokens": 100,
    }


def prior_with_curves(model: nn.Module, config: GlassConfig | None = None) -> GlobalPrior:
    """Return a prior with random scores, and with curves."""
    prior = made_prior(model)
    return replace(prior, about=prior.about | {"curves": [curve_record(model, config)]})


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    """Return the identities of a model's modules and arrays."""
    modules = [(path, id(module)) for path, module in model.named_modules()]
    return modules + [(path, id(array)) for path, array in tree_flatten(model.parameters())]


def random_selection(model: nn.Module, seed: int = 0, share: float = 0.5) -> Selection:
    """Select random neurons, in multiples of `ffn.multiple`."""
    generator = np.random.default_rng(seed)
    indices, widths = {}, {}
    for ffn in find_ffns(model):
        kept = max(1, round(share * ffn.width / ffn.multiple)) * ffn.multiple
        chosen = generator.permuted(all_neurons(ffn), axis=-1)[..., :kept]
        indices[ffn.path], widths[ffn.path] = np.sort(chosen).astype(np.int32), ffn.width
    return Selection(indices, widths)


def all_neurons(ffn: FFN) -> np.ndarray:
    """Return the numbers of an FFN's neurons, (m,) or (experts, m)."""
    return np.broadcast_to(np.arange(ffn.width), ffn.shape)


def local_statistics(
    model: nn.Module, prompt: int, generated: int, seed: int = 0
) -> LocalStatistics:
    """Return local statistics of random hidden vectors."""
    ffns, rng = find_ffns(model), np.random.default_rng(seed)
    statistics = LocalStatistics.empty({ffn.path: ffn.shape for ffn in ffns})
    for part, tokens in ((statistics.prompt, prompt), (statistics.text, generated)):
        for ffn in ffns:
            if tokens and ffn.experts is None:
                part.update(ffn.path, mx.array(rng.normal(size=(1, tokens, ffn.width))))
            elif tokens:
                routing = random_routing(rng, tokens, ffn.experts, 2)
                hidden = mx.array(rng.normal(size=(2 * tokens, ffn.width)))
                part.update(ffn.path, hidden, routing=routing)
    return statistics


def random_routing(rng: np.random.Generator, tokens: int, experts: int, per_token: int) -> Routing:
    """Route tokens to random experts, in the order of the tokens."""
    chosen = [rng.choice(experts, per_token, replace=False) for _ in range(tokens)]
    numbers = mx.arange(tokens * per_token) // per_token
    return Routing(mx.array(np.concatenate(chosen)), numbers, tokens)


class Masked(nn.Module):
    """A projection whose dropped inputs are replaced with zeros or constants."""

    def __init__(
        self, layer: nn.Module, kept: np.ndarray, width: int, constants: mx.array | None
    ) -> None:
        super().__init__()
        self.layer, self._mask = layer, mx.array(membership(kept, width))
        self._constants = mx.zeros(self._mask.shape) if constants is None else constants

    def __call__(self, x, experts=None, **options):
        if experts is None:
            return self.layer(mx.where(self._mask, x, self._constants))
        mask, constants = (a[experts][..., None, :] for a in (self._mask, self._constants))
        return self.layer(mx.where(mask, x, constants), experts, **options)


def masked_model(
    model: nn.Module, selection: Selection, constants: dict[str, mx.array] | None = None
) -> nn.Module:
    """Return the dense model with dropped neurons masked: the reference for slicing."""
    masks = {}
    for ffn in find_ffns(model):
        kept, values = selection.indices[ffn.path], (constants or {}).get(ffn.path)
        for n, member in enumerate(ffn.members):
            own = kept if member is ffn else kept[n]
            own_values = values if member is ffn or values is None else values[n]
            name, down = member.contract
            masks[member.path] = {name: Masked(down, own, member.width, own_values)}
    return with_modules(model, masks)


def statistics_of(
    model: nn.Module, chunks: list[mx.array], cached: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Return the statistics of a prompt that is prefilled in chunks."""
    ffns = find_ffns(model)
    statistics = NeuronStatistics({ffn.path: ffn.shape for ffn in ffns}, tuple(STATISTICS))
    tapped = with_taps(model, statistics.update)
    cache = make_prompt_cache(model) if cached else None
    for chunk in chunks:
        mx.eval(tapped(chunk, cache=cache), statistics.sums)
    scores = {name: statistics.scores(name) for name in STATISTICS}
    routed = {f.path: statistics.routed(f.path) for f in ffns if f.experts}
    return scores | ({"routed": routed} if routed else {})


def assert_same_scores(a: dict, b: dict) -> None:
    for name, scores in a.items():
        for path, values in scores.items():
            np.testing.assert_allclose(values, b[name][path], rtol=2e-4, atol=1e-6)


def check_invariants(model: nn.Module, forward: Callable[[nn.Module], mx.array]) -> None:
    """Check slicing and statistics on one model.

    Args:
        model: the model, which the checks must leave unchanged.
        forward: a function that computes logits of fixed tokens with the model that it gets.
    """
    before = snapshot(model)
    dense = forward(model)

    all_neurons = random_selection(model, share=1.0)
    for policy in DOWN_POLICIES:
        assert mx.array_equal(forward(slice_model(model, all_neurons, policy)), dense)

    selection = random_selection(model)
    sliced = forward(slice_model(model, selection, "scatter"))
    masked = forward(masked_model(model, selection))
    assert mx.linalg.norm(sliced - masked) < 1e-4 * mx.linalg.norm(masked)
    assert mx.linalg.norm(sliced - dense) > 1e-2 * mx.linalg.norm(dense)

    means = {ffn.path: 0.1 * mx.random.normal(ffn.shape) for ffn in find_ffns(model)}
    compensated = SlicedModel(model, find_ffns(model), "scatter")
    compensated.update(selection, {path: MeanCompensation(m) for path, m in means.items()})
    logits = forward(compensated.model)
    masked = forward(masked_model(model, selection, means))
    assert mx.linalg.norm(logits - masked) < 1e-4 * mx.linalg.norm(masked)
    assert mx.linalg.norm(logits - sliced) > 1e-2 * mx.linalg.norm(sliced)

    assert snapshot(model) == before
    assert mx.array_equal(forward(model), dense)


def permuted_projections(ffn: FFN, order: np.ndarray) -> dict[str, nn.Module]:
    """Return an FFN's projections with its neurons permuted by (..., m), within each expert."""
    rows, parts = mx.array(LAYOUTS[ffn.layout](order, ffn.width)), {}
    for name, layer in ffn.expand.items():
        parts[name] = copy.copy(layer)
        parts[name].weight = mx.take_along_axis(layer.weight, rows[..., None], axis=-2)
        if "bias" in layer:
            parts[name].bias = mx.take_along_axis(layer.bias, rows, axis=-1)
    name, down = ffn.contract
    parts[name] = copy.copy(down)
    parts[name].weight = mx.take_along_axis(down.weight, mx.array(order)[..., None, :], axis=-1)
    return parts


def check_statistics(model: nn.Module, tokens: mx.array, chunks: Sequence[int] = (3, 1, 3)) -> None:
    """Check that statistics do not depend on prefill chunks and follow permuted neurons.

    Args:
        model: the model.
        tokens: token ids of shape (B, T).
        chunks: the lengths of chunks.
    """
    whole = statistics_of(model, [tokens], cached=True)
    parts = mx.split(tokens, np.cumsum(chunks)[:-1].tolist(), axis=1)
    assert_same_scores(whole, statistics_of(model, parts, cached=True))
    if model.model_type != "gemma3n":  # without a cache, no layer shares another's keys and values
        assert_same_scores(whole, statistics_of(model, [tokens], cached=False))

    generator = np.random.default_rng(1)
    orders = {f.path: generator.permuted(all_neurons(f), axis=-1) for f in find_ffns(model)}
    modules = {}
    for ffn in find_ffns(model):
        for n, member in enumerate(ffn.members):
            order = orders[ffn.path] if member is ffn else orders[ffn.path][n]
            modules[member.path] = permuted_projections(member, order)
    permuted_model = with_modules(model, modules)
    permuted_scores = statistics_of(permuted_model, [tokens], cached=True)
    expected = {
        name: {
            path: values if name == "routed" else np.take_along_axis(values, orders[path], axis=-1)
            for path, values in scores.items()
        }
        for name, scores in whole.items()
    }
    assert_same_scores(expected, permuted_scores)
    dense = model(tokens)
    assert mx.linalg.norm(permuted_model(tokens) - dense) < 1e-4 * mx.linalg.norm(dense)


class Network(nn.Module):
    """A feed-forward network with unusual parameter names in one of four layouts."""

    WIDTH = 256

    def __init__(self, layout, hidden, activation, biases):
        super().__init__()
        self._layout, self._activation = layout, activation
        rows = self.WIDTH if layout in ("plain", "gated") else 2 * self.WIDTH
        self.into = nn.Linear(hidden, rows, bias=biases[0])
        if layout == "gated":
            self.beside = nn.Linear(hidden, self.WIDTH, bias=biases[0])
        self.back = nn.Linear(self.WIDTH, hidden, bias=biases[1])
        for layer in self.children().values():
            if "bias" in layer:
                layer.bias = mx.random.normal(layer.bias.shape)

    def __call__(self, x):
        h = self.into(x)
        if self._layout == "plain":
            return self.back(self._activation(h))
        if self._layout == "gated":
            return self.back(self._activation(h) * self.beside(x))
        if self._layout == "halves":
            gate, up = mx.split(h, 2, axis=-1)
        else:
            gate, up = h[..., ::2], h[..., 1::2]
        return self.back(self._activation(gate) * up)


class OneFFN(nn.Module):
    """A model that consists of one FFN."""

    def __init__(self, network):
        super().__init__()
        self.layers = [network]

    def __call__(self, x):
        return self.layers[0](x)


class SometimesRight(nn.Module):
    """A draft model that is its target at some places of the text, and wrong at the others.

    Args:
        model: the target.
        is_right: whether it is right after so many tokens. Default: most of the time.
    """

    def __init__(
        self,
        model: nn.Module,
        is_right: Callable[[int], bool] = lambda place: place % 3 != 0 and place % 7 != 2,
    ) -> None:
        super().__init__()
        self.model = model
        self._is_right = is_right

    @property
    def layers(self):
        return self.model.layers

    def __call__(self, tokens, cache=None):
        place = 0 if cache is None else cache[0].offset + tokens.shape[1]
        logits = self.model(tokens, cache=cache)
        return logits if self._is_right(place) else -logits
