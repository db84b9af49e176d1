"""What is asked of the generator, whichever route it came by, and how long its prompt and answer may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from server.errors import InvalidRequest
from server.gateway.access.keys import Caller
from server.gateway.engines.chat import Conversation, Prompt
from server.store.tenants.user_key import User

WHOLE_TOKENS = 1024
"""Longest answer that is requested in one piece: while it is generated, the engine's silence looks like a hang."""

_TEMPLATE_TOKENS = 256
"""More than a chat template adds to a conversation of a few messages."""

_CHARS_A_TOKEN = 4
"""What English has, roughly."""


class Personalize(StrEnum):
    """How much personalisation a request asks for."""

    AUTO = "auto"
    MERGED = "merged"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request for an answer, well-formed.

    Attributes:
        strength: of the anchors beside the common row, relative to the bank's own.
        messages: the conversation; empty where a prompt is continued.
        prompt: what is continued as it is, without a chat template; None for a conversation.
        history: how many of the user's past items the conversation gets.
        max_tokens: longest answer; None for what the context leaves.
        sampling: what the engine gets as it came.
        splittable: whether the engine may send in pieces what the client wants whole.
        patience_s: how long it may wait for a place in the engines; None for as long as is usual.
        user_param, prompt_param, max_tokens_param: the client's names for these, for errors.
    """

    id_prefix: str
    user: User | None
    personalize: Personalize
    strength: float
    messages: Conversation
    prompt: Prompt | None = None
    history: int = 0
    max_tokens: int | None
    sampling: Mapping[str, Any]
    stream: bool
    splittable: bool
    cache_salt: str
    caller: Caller
    patience_s: float | None
    user_param: str
    prompt_param: str
    max_tokens_param: str = "max_tokens"

    @property
    def wants_profile(self) -> bool:
        """Whether the answer depends on who the user is."""
        return self.user is not None and self.personalize is not Personalize.NONE

    @property
    def prompts(self) -> int:
        """How many prompts are continued; 1 for a conversation."""
        return len(self.prompt) if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else 1

    @property
    def sequences(self) -> int:
        """How many answers are generated."""
        return self.prompts * int(self.sampling.get("n", 1))

    @property
    def comes_in_pieces(self) -> bool:
        """Whether the engine sends in pieces what the client may want whole: its places come back one by one.

        Not with tools: what a model says to them the engine reads better as a whole.
        """
        return self.stream or (self.sequences > 1 and "tools" not in self.sampling)


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """How long a request's prompt and answer may be.

    Attributes:
        prompt_chars: longest conversation, in characters, history included.
        context: the model's, in tokens; None until an engine has reported it.
    """

    prompt_chars: int
    context: int | None

    def check(self, request: GenerationRequest) -> None:
        """Refuse what is known to be too long before store and engine are asked."""
        chars = chars_of(request.messages) + _prompt_chars(request.prompt) + _tool_chars(request)
        if chars > self.prompt_chars:
            raise InvalidRequest(
                f"{request.prompt_param} has {chars} characters, at most {self.prompt_chars} are allowed",
                param=request.prompt_param,
                code="prompt_too_long",
            )
        if self.context is not None and request.max_tokens is not None and request.max_tokens >= self.context:
            raise InvalidRequest(
                f"{request.max_tokens_param} {request.max_tokens} leaves no room for a prompt: the model's context is "
                f"{self.context} tokens",
                param=request.max_tokens_param,
                code="context_length_exceeded",
            )

    def check_answer(self, request: GenerationRequest, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` beyond what the prompt leaves by the engine's count; vLLM would silently generate fewer.

        Of several prompts the engine counts only all together, so that its own rule holds for each.
        """
        if prompt_tokens is None or self.context is None or request.max_tokens is None or request.prompts > 1:
            return
        if prompt_tokens + request.max_tokens <= self.context:
            return
        raise InvalidRequest(
            f"{request.max_tokens_param} {request.max_tokens} is more than the prompt leaves: it has {prompt_tokens} "
            f"tokens and the model's context is {self.context}. Ask for at most {self.context - prompt_tokens}",
            param=request.max_tokens_param,
            code="context_length_exceeded",
        )

    def room(self, request: GenerationRequest) -> int | None:
        """Tokens for a conversation and its history; None while the context is unknown."""
        if self.context is None:
            return None
        return self.context - self._answer(request) - _tool_chars(request)

    def tokens(self, request: GenerationRequest) -> int:
        """About how many tokens the prompt, without a history, and all its answers will have."""
        prompt = request.prompt if isinstance(request.prompt, list) else [request.prompt or ""]
        ids = sum(1 if isinstance(part, int) else len(part) if isinstance(part, list) else 0 for part in prompt)
        chars = chars_of(request.messages) + _tool_chars(request)
        chars += sum(len(part) for part in prompt if isinstance(part, str))
        return chars // _CHARS_A_TOKEN + ids + self._answer(request) * request.sequences

    def allow_whole(self, messages: Conversation, max_tokens: int | None) -> bool:
        """Whether an answer can be requested in one piece: it is short, and fits however the prompt is tokenised.

        In doubt the answer is streamed, and refused at its first token if it does not fit.
        """
        if self.context is None or max_tokens is None or max_tokens > WHOLE_TOKENS:
            return False
        return most_tokens(messages) + max_tokens <= self.context

    def _answer(self, request: GenerationRequest) -> int:
        """Tokens that an answer is taken to have."""
        return request.max_tokens if request.max_tokens is not None else min(WHOLE_TOKENS, (self.context or 2048) // 2)


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


def _tool_chars(request: GenerationRequest) -> int:
    """Length of the tools, which the chat template writes into the prompt."""
    return len(orjson.dumps(request.sampling["tools"])) if "tools" in request.sampling else 0
