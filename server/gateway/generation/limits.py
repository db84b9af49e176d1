"""How long a prompt and its answer may be."""

from __future__ import annotations

from dataclasses import dataclass

from bank.items.prompt import chat_messages
from server.errors import InvalidRequest
from server.gateway.http.requests import GenerateRequest

Conversation = list[dict[str, str]]

WHOLE_TOKENS = 1024
"""Longest answer that is requested in one piece: while it is generated, the engine's silence looks like a hang."""

_TEMPLATE_TOKENS = 256
"""More than a chat template adds to a conversation of a few messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for one request.

    Attributes:
        prompt_chars: longest conversation, in characters, history included.
        context: the model's, in tokens; None until an engine has reported it.
    """

    prompt_chars: int
    context: int | None

    def check(self, request: GenerateRequest) -> None:
        """Refuse what is known to be too long before store and engine are asked.

        Raises:
            InvalidRequest: naming the field.
        """
        chars, param = chars_of(conversation(request)), request.conversation_param
        if chars > self.prompt_chars:
            raise InvalidRequest(
                f"{param} has {chars} characters, at most {self.prompt_chars} are allowed",
                param=param,
                code="prompt_too_long",
            )
        if self.context is not None and request.max_tokens >= self.context:
            raise InvalidRequest(
                f"max_tokens {request.max_tokens} leaves no room for a prompt: the model's context is {self.context} "
                "tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def check_answer(self, request: GenerateRequest, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` beyond what the prompt leaves; vLLM would silently generate fewer.

        Args:
            request: as checked before.
            prompt_tokens: the engine's count, if it has reported one.

        Raises:
            InvalidRequest: naming what would fit.
        """
        if prompt_tokens is None or self.context is None or prompt_tokens + request.max_tokens <= self.context:
            return
        raise InvalidRequest(
            f"max_tokens {request.max_tokens} is more than the prompt leaves: it has {prompt_tokens} tokens and the "
            f"model's context is {self.context}. Ask for at most {self.context - prompt_tokens}",
            param="max_tokens",
            code="context_length_exceeded",
        )

    def allow_whole(self, messages: Conversation, max_tokens: int) -> bool:
        """Whether an answer can be requested in one piece: it is short, and fits however the prompt is tokenised.

        In doubt the answer is streamed, and refused at its first token if it does not fit.
        """
        if self.context is None or max_tokens > WHOLE_TOKENS:
            return False
        return most_tokens(messages) + max_tokens <= self.context


def conversation(request: GenerateRequest) -> Conversation:
    """The request's conversation, as messages."""
    if request.prompt is not None:
        return chat_messages(request.prompt)
    return [message.model_dump() for message in request.messages or ()]


def chars_of(messages: Conversation) -> int:
    """Length of a conversation in characters."""
    return sum(len(message["content"]) for message in messages)


def most_tokens(messages: Conversation) -> int:
    """The most tokens that a conversation can take: a token is at least a byte of text."""
    return sum(size_bytes(message["content"]) for message in messages) + 16 * len(messages) + _TEMPLATE_TOKENS


def size_bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text.encode("utf-8", "replace"))
