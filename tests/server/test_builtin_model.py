"""The server with the built-in model, its prior and its curves."""

import openai
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("default_gguf")
def test_the_built_in_model_converses(run_server):
    with run_server(None, "--dtype", "float32", "--dequantize", "--temp", 0) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        ask = client.chat.completions.create
        answer = ask(model="default_model", messages=messages, max_tokens=24)
        text = answer.choices[0].message.content
        assert "Paris" in text
        assert answer.model == "SmolLM2-135M-Instruct"
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And of Italy?"},
        ]
        chunks = list(
            ask(
                model="default_model",
                messages=messages,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "Rome" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        cached = chunks[-1].usage.prompt_tokens_details.cached_tokens
        assert cached >= answer.usage.prompt_tokens
        answer = client.completions.create(model="default_model", prompt="Once", max_tokens=40)
        assert answer.usage.glass["max_kl"] == 0
        assert answer.usage.glass["bytes_share"] < 1
