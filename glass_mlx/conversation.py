"""A conversation that continues from one command to the next, kept with its prompt cache."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glass_mlx.cache_file import cache_metadata, load_prompt_cache, save_prompt_cache
from glass_mlx.chat_templates import Messages, encode, encode_rest, is_message
from glass_mlx.prompt_cache import PromptCache, make_empty_copy, trim_to_shared

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper


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
            ValueError: if the file is not a complete prompt cache, does not name its model, or has
                malformed messages or options.
        """
        cache, metadata = load_prompt_cache(file, return_metadata=True)
        if not isinstance(metadata.get("model"), str):
            raise ValueError(f"the prompt cache {file} does not name its model")
        messages = _parse(metadata.get("messages", "[]"))
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise ValueError(
                f"the messages in the prompt cache {file} are not a list of roles and contents"
            )
        tokenizer_config = _parse(metadata.get("tokenizer_config", "{}"))
        if not isinstance(tokenizer_config, dict):
            raise ValueError(f"the tokenizer options in the prompt cache {file} are not an object")
        return Conversation(cache, messages, metadata["model"], tokenizer_config)

    def unread_tokens(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        messages: Messages,
        ignore_template: bool,
        will_be_saved: bool,
        template_options: dict[str, Any],
    ) -> list[int]:
        """Encode the part of the conversation that the model has not read yet.

        If earlier messages now give other tokens than those in the cache, the cache is trimmed to
        the tokens that both share. If it cannot be trimmed, because it has lost earlier contents,
        everything is read again into a new cache.

        Args:
            model: the model.
            tokenizer: the model's tokenizer.
            messages: the new messages.
            ignore_template: whether to encode as if the model had no chat template.
            will_be_saved: whether the conversation continues after this turn.
            template_options: options of the chat template.

        Returns:
            Token ids.

        Raises:
            ValueError: if the conversation cannot continue with these messages.
        """
        if self.cache is None:
            return encode(tokenizer, messages, ignore_template, **template_options)
        if ignore_template or not tokenizer.has_chat_template:
            return encode_rest(tokenizer, messages, ignore_template)
        if not self.history:
            if will_be_saved:
                raise ValueError(
                    "the prompt cache does not tell what was said, so no conversation can continue "
                    "from it; make a new one with python -m glass_mlx.cache_prompt"
                )
            return encode_rest(tokenizer, messages, **template_options)
        if any(message["role"] == "system" for message in messages):
            raise ValueError("--system-prompt is for the beginning of a conversation")
        tokens = encode(tokenizer, full_history(self.history, messages), **template_options)
        shared = trim_to_shared(self.cache, tokens)
        if shared is None:
            self.cache = make_empty_copy(model, self.cache)
            return tokens
        return tokens[shared:]

    def save(self, file: str | Path, model: str | None, messages: Messages | None) -> None:
        """Save the prompt cache, with the messages in its metadata.

        Args:
            file: the file to write.
            model: the name of the model; None for the built-in model.
            messages: all messages, or None if no conversation can continue from them.

        Raises:
            OSError: if a file cannot be written.
        """
        assert self.cache is not None
        metadata = cache_metadata(model, self.tokenizer_config)
        if messages is not None:
            metadata["messages"] = json.dumps(messages)
        save_prompt_cache(file, self.cache, metadata)


def _parse(text: object) -> Any:
    """Return the value of a JSON text, or None if it is not JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def full_history(history: Messages, messages: Messages) -> Messages:
    """Append new messages. If the history ends with a user message, the first completes it."""
    if history and history[-1]["role"] == "user":
        *history, beginning = history
        first, *rest = messages
        messages = [first | {"content": beginning["content"] + first["content"]}, *rest]
    return history + messages


def with_answer(messages: Messages, text: str) -> Messages:
    """Append an answer. The last message may already hold the beginning of the answer."""
    if messages[-1]["role"] == "assistant":
        *messages, beginning = messages
        text = beginning["content"] + text
    return [*messages, {"role": "assistant", "content": text}]
