"""How long a prompt and its answer may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from server.errors import InvalidRequest
from server.gateway.engines.chat import Conversation, Prompt
from server.gateway.generation.asked import Asked

WHOLE_TOKENS = 1024
"""Longest answer that is requested in one piece: while it is generated, the engine's silence looks like a hang."""

_TEMPLATE_TOKENS = 256
"""More than a chat template adds to a conversation of a few messages."""

_CHARS_A_TOKEN = 4
"""What English has, roughly."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for one request.

    Attributes:
        prompt_chars: longest conversation, in characters, history included.
        context: the model's, in tokens; None until an engine has reported it.
    """

    prompt_chars: int
    context: int | None

    def check(self, asked: Asked) -> None:
        """Refuse what is known to be too long before store and engine are asked.

        Raises:
            InvalidRequest: naming the field.
        """
        chars, param = chars_of(asked.messages) + _prompt_chars(asked.prompt) + _tool_chars(asked), asked.prompt_param
        if chars > self.prompt_chars:
            raise InvalidRequest(
                f"{param} has {chars} characters, at most {self.prompt_chars} are allowed",
                param=param,
                code="prompt_too_long",
            )
        if self.context is not None and asked.max_tokens is not None and asked.max_tokens >= self.context:
            raise InvalidRequest(
                f"{asked.max_tokens_param} {asked.max_tokens} leaves no room for a prompt: the model's context is "
                f"{self.context} tokens",
                param=asked.max_tokens_param,
                code="context_length_exceeded",
            )

    def check_answer(self, asked: Asked, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` beyond what the prompt leaves; vLLM would silently generate fewer.

        Of several prompts the engine counts only all together, so that its own rule holds for each.

        Args:
            asked: as checked before.
            prompt_tokens: the engine's count, if it has reported one.

        Raises:
            InvalidRequest: naming what would fit.
        """
        if prompt_tokens is None or self.context is None or asked.max_tokens is None or asked.has_many_prompts:
            return
        if prompt_tokens + asked.max_tokens <= self.context:
            return
        raise InvalidRequest(
            f"{asked.max_tokens_param} {asked.max_tokens} is more than the prompt leaves: it has {prompt_tokens} "
            f"tokens and the model's context is {self.context}. Ask for at most {self.context - prompt_tokens}",
            param=asked.max_tokens_param,
            code="context_length_exceeded",
        )

    def room(self, asked: Asked) -> int | None:
        """Tokens for a conversation and its history; None while the context is unknown."""
        if self.context is None:
            return None
        return self.context - self._answer(asked) - _tool_chars(asked)

    def tokens(self, asked: Asked) -> int:
        """About how many tokens the prompt, without a history, and all its answers will have."""
        chars = chars_of(asked.messages) + _tool_chars(asked)
        prompt = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt or ""]
        ids = sum(1 if isinstance(part, int) else len(part) if isinstance(part, list) else 0 for part in prompt)
        chars += sum(len(part) for part in prompt if isinstance(part, str))
        return chars // _CHARS_A_TOKEN + ids + self._answer(asked) * asked.sequences

    def _answer(self, asked: Asked) -> int:
        """Tokens that an answer is taken to have."""
        return asked.max_tokens if asked.max_tokens is not None else min(WHOLE_TOKENS, (self.context or 2048) // 2)

    def allow_whole(self, messages: Conversation, max_tokens: int | None) -> bool:
        """Whether an answer can be requested in one piece: it is short, and fits however the prompt is tokenised.

        In doubt the answer is streamed, and refused at its first token if it does not fit.
        """
        if self.context is None or max_tokens is None or max_tokens > WHOLE_TOKENS:
            return False
        return most_tokens(messages) + max_tokens <= self.context


def chars_of(messages: Conversation) -> int:
    """Length of a conversation in characters."""
    return sum(len(_said(message)) for message in messages)


def most_tokens(messages: Conversation) -> int:
    """The most tokens that a conversation can take: a token is at least a byte of text."""
    return sum(size_bytes(_said(message)) for message in messages) + 16 * len(messages) + _TEMPLATE_TOKENS


def size_bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text.encode("utf-8", "replace"))


def _said(message: dict[str, Any]) -> str:
    """What a message puts into the prompt."""
    text: str = message.get("content", "")
    return text + orjson.dumps(message["tool_calls"]).decode() if "tool_calls" in message else text


def _prompt_chars(prompt: Prompt | None) -> int:
    """Length of a prompt; a token counts as a character."""
    if not isinstance(prompt, list):
        return len(prompt or "")
    return sum(1 if isinstance(part, int) else len(part) for part in prompt)


def _tool_chars(asked: Asked) -> int:
    """Length of the tools, which the chat template writes into the prompt."""
    return len(orjson.dumps(asked.sampling["tools"])) if "tools" in asked.sampling else 0
