"""A conversation that continues from one command to the next, kept with its prompt cache."""

import json
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from glass_mlx.chat import encode, encode_rest
from glass_mlx.prompt_cache import (
    PromptCache,
    cache_metadata,
    load_prompt_cache,
    save_prompt_cache,
)

from mlx_lm.tokenizer_utils import TokenizerWrapper

Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """The messages so far, and the prompt cache that holds their tokens.

    Attributes:
        cache: the prompt cache, or None if the conversation is new and will not be saved.
        history: the messages so far. Empty if the cache's file does not hold them.
        model: the name of the model that the cache belongs to, or None for a new conversation.
        tokenizer_config: the options that the model's tokenizer was loaded with.
    """

    cache: PromptCache | None = None
    history: Messages = field(default_factory=list)
    model: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(file: str) -> "Conversation":
        """Load the conversation that `save` wrote, or a prompt cache that mlx-lm wrote.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is no complete prompt cache, or does not name its model.
        """
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        if metadata.get("model") is None:
            raise ValueError(f"the prompt cache {file} does not name its model")
        return Conversation(
            cache,
            json.loads(metadata.get("messages", "[]")),
            metadata["model"],
            json.loads(metadata.get("tokenizer_config", "{}")),
        )

    def unread_tokens(
        self,
        tokenizer: TokenizerWrapper,
        messages: Messages,
        ignore_template: bool,
        will_be_saved: bool,
        template_options: dict[str, Any],
    ) -> list[int]:
        """Encode what the model has not read yet. This may trim the cache.

        Args:
            tokenizer: the model's tokenizer.
            messages: the new messages.
            ignore_template: encode as if the model had no chat template.
            will_be_saved: whether the conversation goes on after this turn.
            template_options: for the chat template.

        Raises:
            ValueError: if the conversation cannot continue like this.
        """
        if self.cache is None:
            return encode(tokenizer, messages, ignore_template, **template_options)
        if ignore_template or not tokenizer.has_chat_template:
            return encode_rest(tokenizer, messages, ignore_template)
        if not self.history:
            if will_be_saved:
                raise ValueError(
                    "the prompt cache does not tell what was said, so no conversation can continue "
                    "from it; make it with python -m glass_mlx.cache_prompt"
                )
            return encode_rest(tokenizer, messages, **template_options)
        if any(message["role"] == "system" for message in messages):
            raise ValueError("--system-prompt is for the beginning of a conversation")
        tokens = encode(tokenizer, full_history(self.history, messages), **template_options)
        pairs = zip(self.cache.tokens, tokens[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if same < len(self.cache.tokens):
            self.cache.trim(len(self.cache.tokens) - same)
        return tokens[same:]

    def save(self, file: str | Path, model: str | None, messages: Messages | None) -> None:
        """Save the prompt cache, and the messages in it if there are any to continue from.

        Raises:
            OSError: if a file cannot be written.
        """
        assert self.cache is not None
        metadata = cache_metadata(model, self.tokenizer_config)
        if messages is not None:
            metadata["messages"] = json.dumps(messages)
        save_prompt_cache(file, self.cache, metadata)


def full_history(history: Messages, messages: Messages) -> Messages:
    """Append new messages. The first may complete a user's message that the history begins."""
    if history and history[-1]["role"] == "user":
        *history, beginning = history
        first, *rest = messages
        messages = [first | {"content": beginning["content"] + first["content"]}, *rest]
    return history + messages


def with_answer(messages: Messages, text: str) -> Messages:
    """Append an answer. The last message may already be its beginning."""
    if messages[-1]["role"] == "assistant":
        *messages, beginning = messages
        text = beginning["content"] + text
    return [*messages, {"role": "assistant", "content": text}]
