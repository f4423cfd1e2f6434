"""The parts of mlx-lm that glass-mlx uses beyond the public API (see docs/CONTRIBUTING.md).

If a new mlx-lm changes one of these parts, the test with its name fails.
"""

import importlib
import inspect
from operator import attrgetter

import mlx_lm.server
import pytest

# Module, name, and the parameters that are passed.
USED = [
    (
        "mlx_lm.generate",
        "generate_step",
        [
            *("prompt", "model", "max_tokens", "sampler", "logits_processors", "prompt_cache"),
            *("prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start"),
            *("prompt_progress_callback", "input_embeddings"),
        ],
    ),
    ("mlx_lm.generate", "wired_limit", ["model", "streams"]),
    ("mlx_lm.generate", "generation_stream", []),
    ("mlx_lm.generate", "setup_arg_parser", []),
    ("mlx_lm.cache_prompt", "setup_arg_parser", []),
    ("mlx_lm.chat", "setup_arg_parser", []),
    ("mlx_lm.benchmark", "setup_arg_parser", []),
    ("mlx_lm.evaluate", "MLXLM", ["path_or_hf_repo"]),
    ("mlx_lm.evaluate", "DEFAULT_MAX_TOKENS", []),
    ("mlx_lm.evaluate", "_lstrip", ["s", "pattern"]),
    ("mlx_lm.evaluate", "chat_template_fn", ["extra_kwargs"]),
    ("mlx_lm.perplexity", "load_data", ["data_path", "num_samples", "sequence_length"]),
    (
        "mlx_lm.generate",
        "BatchGenerator",
        ["model", "sampler", "stop_tokens", "completion_batch_size", "prefill_batch_size"],
    ),
    (
        "mlx_lm.generate",
        "GenerationResponse",
        [
            *("text", "token", "logprobs", "from_draft", "prompt_tokens", "prompt_tps"),
            *("generation_tokens", "generation_tps", "peak_memory", "finish_reason"),
        ],
    ),
    ("mlx_lm.models.cache", "make_prompt_cache", ["model", "max_kv_size"]),
    ("mlx_lm.models.cache", "save_prompt_cache", ["file_name", "cache", "metadata"]),
    ("mlx_lm.models.cache", "load_prompt_cache", ["file_name", "return_metadata"]),
    ("mlx_lm.models.cache", "can_trim_prompt_cache", ["cache"]),
    ("mlx_lm.models.cache", "trim_prompt_cache", ["cache", "num_tokens"]),
    ("mlx_lm.models.cache", "KVCache", []),
    ("mlx_lm.models.cache", "QuantizedKVCache", []),
    ("mlx_lm.models.cache", "RotatingKVCache", ["max_size", "keep"]),
    ("mlx_lm.models.cache", "RotatingKVCache.make_mask", ["N", "window_size", "return_array"]),
    ("mlx_lm.models.cache", "CacheList", []),
    ("mlx_lm.generate", "DEFAULT_QUANTIZED_KV_START", []),
    (
        "mlx_lm.generate",
        "maybe_quantize_kv_cache",
        ["prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"],
    ),
    ("mlx_lm.models.switch_layers", "SwitchLinear", []),
    ("mlx_lm.models.switch_layers", "QuantizedSwitchLinear", []),
    ("mlx_lm.models.switch_layers", "SwitchLinear.__call__", ["x", "indices", "sorted_indices"]),
    (
        "mlx_lm.models.switch_layers",
        "QuantizedSwitchLinear.__call__",
        ["x", "indices", "sorted_indices"],
    ),
    ("mlx_lm.sample_utils", "apply_min_p", ["logprobs", "min_p", "min_tokens_to_keep"]),
    ("mlx_lm.sample_utils", "apply_top_k", ["logprobs", "top_k"]),
    ("mlx_lm.sample_utils", "apply_top_p", ["logprobs", "top_p"]),
    (
        "mlx_lm.sample_utils",
        "apply_xtc",
        ["logits", "xtc_probability", "xtc_threshold", "xtc_special_tokens"],
    ),
    (
        "mlx_lm.utils",
        "save",
        ["dst_path", "src_path_or_repo", "model", "tokenizer", "config", "donate_model"],
    ),
    ("mlx_lm.utils", "load_model", ["model_path", "lazy"]),
    ("mlx_lm.utils", "_parse_size", ["x"]),
    (
        "mlx_lm.utils",
        "quantize_model",
        ["model", "config", "group_size", "bits", "quant_predicate"],
    ),
    ("mlx_lm.convert", "QUANT_RECIPES", []),
    ("mlx_lm.convert", "mixed_quant_predicate_builder", ["recipe", "model", "group_size"]),
    (
        "mlx_lm.quant.awq",
        "awq_quantize",
        [
            *("model", "inputs", "awq_config", "group_size", "bits"),
            *("embed_group_size", "embed_bits", "n_grid"),
        ],
    ),
    ("mlx_lm.quant.awq", "AWQ_MODEL_CONFIGS", []),
    ("mlx_lm.quant.awq", "update_config", ["model", "config"]),
    (
        "mlx_lm.quant.dwq",
        "dwq_quantize",
        [
            *("model", "target_fn", "opt", "train_data", "valid_data", "batch_size"),
            *("max_seq_length", "seed", "dtype"),
        ],
    ),
    (
        "mlx_lm.quant.dynamic_quant",
        "estimate_sensitivities",
        ["model", "data", "low_bits", "low_group_size", "high_bits", "high_group_size"],
    ),
    (
        "mlx_lm.quant.dynamic_quant",
        "estimate_threshold",
        [
            *("model", "sensitivities", "target_bpw", "low_bits", "low_group_size", "high_bits"),
            "high_group_size",
        ],
    ),
    ("mlx_lm.models.llama", "Model.shard", ["group"]),
    ("mlx_lm.models.deepseek_v3", "Model.shard", ["group"]),
    ("mlx_lm.models.pipeline", "PipelineMixin.pipeline", ["group"]),
    ("mlx_lm.tuner.lora", "LoRALinear", ["input_dims", "output_dims", "r", "scale"]),
    ("mlx_lm.tuner.lora", "LoRASwitchLinear.__call__", ["x", "indices", "sorted_indices"]),
    ("mlx_lm.tuner.dora", "DoRALinear", ["input_dims", "output_dims", "r", "scale"]),
]

# What the server uses. mlx-lm 0.31 has another server, which glass-mlx refuses.
SERVER = [
    ("TextStateMachine", []),
    ("ModelProvider", ["cli_args"]),
    ("ModelProvider.load", ["model_path", "adapter_path", "draft_model_path"]),
    ("ModelProvider._load", ["model_path", "adapter_path", "draft_model_path"]),
    ("ModelProvider.load_default", []),
    ("ModelProvider.reset", []),
    ("ResponseGenerator", ["model_provider", "prompt_cache"]),
    ("ResponseGenerator._generate", []),
    ("ResponseGenerator._next_request", ["timeout"]),
    ("ResponseGenerator.join", []),
    ("ResponseGenerator._serve_single", ["request", "stream"]),
    ("ResponseGenerator._is_batchable", ["args"]),
    ("ResponseGenerator._tokenize", ["tokenizer", "request", "args"]),
    ("ResponseGenerator._make_state_machine", ["model_key", "tokenizer", "stop_words"]),
    ("ResponseGenerator.generate", ["request", "generation_args", "progress_callback"]),
    ("ResponseGenerator.generation_available", []),
    ("ResponseGenerator.stop_and_join", []),
    ("APIHandler", ["response_generator", "system_fingerprint"]),
    ("APIHandler.do_POST", []),
    ("APIHandler.validate_model_parameters", []),
    ("APIHandler.handle_chat_completions", []),
    ("APIHandler.handle_text_completions", []),
    (
        "APIHandler.generate_response",
        [
            *("text", "finish_reason", "prompt_token_count", "completion_token_count"),
            *("token_logprobs", "top_tokens", "tokens"),
        ],
    ),
    (
        "APIHandler.completion_usage_response",
        ["prompt_token_count", "completion_token_count", "prompt_cache_count"],
    ),
    ("APIHandler._set_completion_headers", ["status_code"]),
    ("APIHandler._set_stream_headers", ["status_code"]),
    ("CompletionRequest", ["request_type", "prompt", "messages", "tools", "role_mapping"]),
    ("Response", ["text", "token", "logprob", "finish_reason", "top_tokens"]),
    (
        "GenerationContext",
        [
            *("has_tool_calling", "has_thinking", "tool_parser", "text_sm", "initial_state"),
            *("prompt", "prompt_cache_count", "_should_stop"),
        ],
    ),
    (
        "GenerationArguments",
        ["sampling", "logits", "stop_words", "max_tokens", "logprobs", "top_logprobs", "seed"],
    ),
    ("_make_logits_processors", ["args"]),
    ("get_system_fingerprint", []),
    ("LRUPromptCache", ["max_size", "max_bytes"]),
    ("LRUPromptCache.fetch_nearest_cache", ["model", "tokens"]),
    ("LRUPromptCache.insert_cache", ["model", "tokens", "prompt_cache"]),
]
if hasattr(mlx_lm.server, "TextStateMachine"):
    USED += [("mlx_lm.server", name, parameters) for name, parameters in SERVER]


@pytest.mark.parametrize(("module", "name", "parameters"), USED, ids=lambda value: str(value))
def test_mlx_lm_still_has(module, name, parameters):
    if module == "mlx_lm.evaluate":
        pytest.importorskip("lm_eval")
    used = attrgetter(name)(importlib.import_module(module))
    if parameters:
        assert {*parameters} <= {*inspect.signature(used).parameters}


def test_the_decode_loop_samples_one_more_token_than_it_yields():
    """`decoding.Decoder` relies on it to hand over from one model to the next."""
    from glass_mlx.models.architectures import tiny_model

    import mlx.core as mx
    from mlx_lm.generate import generate_step

    sampled = []

    def sampler(logprobs):
        sampled.append(mx.argmax(logprobs, axis=-1))
        return sampled[-1]

    steps = generate_step(mx.array([1, 2]), tiny_model("llama"), max_tokens=3, sampler=sampler)
    assert [int(token) for token, _ in steps] == [token.item() for token in sampled[:3]]
    assert len(sampled) == 4


def test_the_decode_loop_calls_the_model_once_for_each_token():
    """`engine.Interleaved` counts the calls to know which model computes a token."""
    from glass_mlx.models.architectures import tiny_model

    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model, read = tiny_model("llama"), []

    def record(tokens, cache):
        read.append(tokens.tolist())
        return model(tokens, cache=cache)

    cache = make_prompt_cache(model)
    steps = generate_step(mx.array([5]), record, max_tokens=4, prompt_cache=cache)
    tokens = [int(token) for token, _ in steps]
    assert read == [[[token]] for token in [5, *tokens]]


def test_a_model_asks_its_caches_for_masks_in_the_order_sinks_latest_tokens_new_tokens():
    """`cache_masks` replaces the masks of rotating caches."""
    import mlx.core as mx
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.cache import RotatingKVCache

    cache, asked = RotatingKVCache(6, keep=2), []
    for tokens in (range(9), [9]):  # at once and one by one
        values = mx.array([*tokens], mx.float32).reshape(1, 1, -1, 1)
        cache.update_and_fetch(values, values)
    cache.make_mask = lambda n, **options: asked.append((n, {*options}))
    create_attention_mask(mx.zeros((1, 3, 8)), cache, window_size=6)
    assert asked == [(3, {"window_size", "return_array"})]
    values = mx.array([10, 11, 12], mx.float32).reshape(1, 1, 3, 1)
    keys, _ = cache.update_and_fetch(values, values)
    assert keys.flatten().tolist() == [0, 1, 7, 8, 9, 10, 11, 12]


def test_mlx_divides_layers_by_contiguous_parts():
    """`models.division` and `models.summed` rely on the order of neurons and on the attributes."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.nn.layers import distributed

    group = type("Group", (), {"size": lambda self: 2, "rank": lambda self: 1})()
    weight = {"weight": mx.arange(8).reshape(4, 2)}
    rows = distributed._shard(weight, distributed._all_to_sharded(1), group)
    assert rows["weight"].tolist() == [[4, 5], [6, 7]]
    columns = distributed._shard(weight, distributed._sharded_to_all(1), group)
    assert columns["weight"].tolist() == [[1], [3], [5], [7]]
    layer = nn.ShardedToAllLinear.from_linear(nn.Linear(4, 2), group=mx.distributed.init())
    assert layer.group.size() == 1


@pytest.mark.parametrize("kind", ["SwitchGLU", "SwitchMLP"])
def test_stacks_of_experts_sort_many_tokens_with_argsort(kind):
    """`models.taps` tells the token of each sorted hidden vector by the same sort."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import switch_layers

    class Recorder(nn.Module):
        def __call__(self, x, indices, sorted_indices=False):
            seen.append((x, indices, sorted_indices))
            return down(x, indices, sorted_indices=sorted_indices)

    seen: list = []
    stack = getattr(switch_layers, kind)(8, 16, 4, activation=lambda x, *gate: x)
    name = "down_proj" if kind == "SwitchGLU" else "fc2"
    down, stack[name] = stack[name], Recorder()
    for tokens, is_sorted in ((31, False), (32, True)):
        x, experts = mx.random.normal((1, tokens, 8)), mx.random.randint(0, 4, (1, tokens, 2))
        stack(x, experts)
        hidden, order, given = seen.pop()
        assert given == is_sorted
        rows = mx.argsort(experts.flatten()) if is_sorted else mx.arange(2 * tokens)
        assert mx.array_equal(order.flatten(), experts.flatten()[rows])
        first = stack["up_proj" if kind == "SwitchGLU" else "fc1"]
        expected = first(x[0, rows // 2][:, None], experts.flatten()[rows])
        assert mx.allclose(hidden.reshape(2 * tokens, 16), expected[:, 0], atol=1e-5)
