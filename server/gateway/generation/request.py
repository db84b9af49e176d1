"""A request for an answer, whichever route it came by, and how long its prompt and answer may be."""

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
    """One request for an answer, well-formed: to a conversation, or with a `prompt` the continuation of that."""

    id_prefix: str
    user: User | None
    personalize: Personalize
    strength: float  # of the anchors beside the common row, relative to the bank's own
    messages: Conversation
    prompt: Prompt | None = None  # continued as it is, without a chat template
    history: int = 0  # how many of the user's past items the conversation gets
    max_tokens: int | None  # None for what the context leaves
    sampling: Mapping[str, Any]  # what the engine gets as it came
    stream: bool
    splittable: bool  # whether the engine may send in pieces what the client wants whole
    cache_salt: str
    caller: Caller
    patience_s: float | None  # how long it may wait for a place in the engines; None for as long as is usual
    user_param: str  # this and the next two are the client's names, for errors
    prompt_param: str
    max_tokens_param: str = "max_tokens"

    @property
    def wants_profile(self) -> bool:
        """Whether the answer depends on who the user is."""
        return self.user is not None and self.personalize is not Personalize.NONE

    @property
    def sequences(self) -> int:
        """How many answers are generated."""
        return len(prompts_of(self.prompt)) * int(self.sampling.get("n", 1))


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """How long a request's prompt and answer may be."""

    prompt_chars: int  # longest conversation, history included
    context: int | None  # the model's, in tokens; None until an engine has reported it

    def check(self, request: GenerationRequest) -> None:
        """Refuse what is known to be too long before store and engine are asked."""
        chars = chars_of(request.messages) + sum(_prompt_length(request.prompt)) + _tool_chars(request)
        if chars > self.prompt_chars:
            message = f"{request.prompt_param} has {chars} characters, at most {self.prompt_chars} are allowed"
            raise InvalidRequest(message, param=request.prompt_param, code="prompt_too_long")
        if self.context is not None and request.max_tokens is not None and request.max_tokens >= self.context:
            raise _no_room(request, f"leaves no room for a prompt: the model's context is {self.context} tokens")

    def check_answer(self, request: GenerationRequest, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` beyond what the prompt leaves by the engine's count; vLLM would silently generate fewer.

        Several prompts are not checked: the engine counts them together only, and applies its own rule to each.
        """
        if (
            prompt_tokens is None
            or self.context is None
            or request.max_tokens is None
            or len(prompts_of(request.prompt)) > 1
        ):
            return
        if prompt_tokens + request.max_tokens > self.context:
            raise _no_room(
                request,
                f"is more than the prompt leaves: it has {prompt_tokens} tokens and the model's context is "
                f"{self.context}. Ask for at most {self.context - prompt_tokens}",
            )

    def room(self, request: GenerationRequest) -> int | None:
        """Tokens for a conversation and its history; None while the context is unknown."""
        return None if self.context is None else self.context - self._answer(request) - _tool_chars(request)

    def tokens(self, request: GenerationRequest) -> int:
        """About how many tokens the prompt, without a history, and all its answers will have."""
        chars, ids = _prompt_length(request.prompt)
        chars += chars_of(request.messages) + _tool_chars(request)
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


def _no_room(request: GenerationRequest, why: str) -> InvalidRequest:
    param = request.max_tokens_param
    return InvalidRequest(f"{param} {request.max_tokens} {why}", param=param, code="context_length_exceeded")


def prompts_of(prompt: Prompt | None) -> list[Any]:
    """The prompts of a request, each a text or token ids; of a conversation None."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


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


def _prompt_length(prompt: Prompt | None) -> tuple[int, int]:
    """The characters and the token ids of a prompt."""
    parts = prompt if isinstance(prompt, list) else [prompt or ""]
    chars = sum(len(part) for part in parts if isinstance(part, str))
    return chars, sum(1 if isinstance(part, int) else len(part) for part in parts if not isinstance(part, str))


def _tool_chars(request: GenerationRequest) -> int:
    """Length of the tools, which the chat template writes into the prompt."""
    return len(orjson.dumps(request.sampling["tools"])) if "tools" in request.sampling else 0
