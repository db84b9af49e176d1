"""A generation request, independent of its route, and the length limits of its prompt and answer."""

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

WHOLE_TOKENS = 1024  # longest answer requested in one piece: until it is complete, a working engine looks hung
_TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to a conversation of a few messages
_CHARS_PER_TOKEN = 4  # approximately, in English


class Personalize(StrEnum):
    AUTO = "auto"
    MERGED = "merged"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A validated request: an answer to a conversation, or a continuation of `prompt`."""

    id_prefix: str
    user: User | None
    personalize: Personalize
    strength: float  # factor on the bank's anchor weights relative to the common row
    messages: Conversation
    prompt: Prompt | None = None  # continued verbatim, without a chat template
    history: int = 0  # number of the user's past items to add to the conversation
    max_tokens: int | None  # None for the rest of the context
    sampling: Mapping[str, Any]  # fields passed to the engine unchanged
    stream: bool
    splittable: bool  # whether the engine may stream an answer that the client wants whole
    cache_salt: str
    caller: Caller
    patience_s: float | None  # longest wait for a place in the engines, in seconds; None for the default
    user_param: str  # these three are the field names used in error messages
    prompt_param: str
    max_tokens_param: str = "max_tokens"

    @property
    def wants_profile(self) -> bool:
        return self.user is not None and self.personalize is not Personalize.NONE

    @property
    def sequences(self) -> int:
        """Number of answers to generate."""
        return len(prompts_of(self.prompt)) * int(self.sampling.get("n", 1))


@dataclass(frozen=True, slots=True)
class LengthLimits:
    prompt_chars: int  # maximum length of a conversation with its history, in characters
    context: int | None  # the model's context length in tokens; None until an engine has reported it

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request whose length alone exceeds the limits, before calling the store or an engine."""
        chars = chars_of(request.messages) + sum(_prompt_length(request.prompt)) + _tool_chars(request)
        if chars > self.prompt_chars:
            message = f"{request.prompt_param} has {chars} characters, at most {self.prompt_chars} are allowed"
            raise InvalidRequest(message, param=request.prompt_param, code="prompt_too_long")
        if self.context is not None and request.max_tokens is not None and request.max_tokens >= self.context:
            raise _context_exceeded(request, f"leaves no room for a prompt: the context is {self.context} tokens")

    def check_answer(self, request: GenerationRequest, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` that exceeds the context left by the prompt; vLLM would silently generate fewer tokens.

        Several prompts are not checked: the engine reports only their total and applies its own rule to each prompt.
        """
        if (
            prompt_tokens is None
            or self.context is None
            or request.max_tokens is None
            or len(prompts_of(request.prompt)) > 1
        ):
            return
        if prompt_tokens + request.max_tokens > self.context:
            raise _context_exceeded(
                request,
                f"exceeds the context: the prompt has {prompt_tokens} tokens and the model's context is "
                f"{self.context}. Ask for at most {self.context - prompt_tokens}",
            )

    def room(self, request: GenerationRequest) -> int | None:
        """Return the tokens available for a conversation and its history; None while the context is unknown."""
        return None if self.context is None else self.context - self._answer_tokens(request) - _tool_chars(request)

    def tokens(self, request: GenerationRequest) -> int:
        """Estimate the tokens of the prompt, without history, and of all its answers."""
        chars, ids = _prompt_length(request.prompt)
        chars += chars_of(request.messages) + _tool_chars(request)
        return chars // _CHARS_PER_TOKEN + ids + self._answer_tokens(request) * request.sequences

    def allow_whole(self, messages: Conversation, max_tokens: int | None) -> bool:
        """Return whether to request an answer in one piece: it is short and fits with any tokenisation of the prompt.

        Other answers are streamed, and refused at the first token if they do not fit.
        """
        if self.context is None or max_tokens is None or max_tokens > WHOLE_TOKENS:
            return False
        return max_prompt_tokens(messages) + max_tokens <= self.context

    def _answer_tokens(self, request: GenerationRequest) -> int:
        return request.max_tokens if request.max_tokens is not None else min(WHOLE_TOKENS, (self.context or 2048) // 2)


def _context_exceeded(request: GenerationRequest, why: str) -> InvalidRequest:
    param = request.max_tokens_param
    return InvalidRequest(f"{param} {request.max_tokens} {why}", param=param, code="context_length_exceeded")


def prompts_of(prompt: Prompt | None) -> list[Any]:
    """Return the prompts of a request, each a text or token ids; `[None]` for a conversation."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def chars_of(messages: Conversation) -> int:
    return sum(len(_prompt_text(message)) for message in messages)


def max_prompt_tokens(messages: Conversation) -> int:
    """Return an upper bound on the tokens of a conversation: each token covers at least one byte."""
    return sum(size_bytes(_prompt_text(message)) for message in messages) + 16 * len(messages) + _TEMPLATE_TOKENS


def size_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _prompt_text(message: dict[str, Any]) -> str:
    text: str = message.get("content", "")
    return text + orjson.dumps(message["tool_calls"]).decode() if "tool_calls" in message else text


def _prompt_length(prompt: Prompt | None) -> tuple[int, int]:
    """Return the numbers of characters and of token ids in a prompt."""
    parts = prompt if isinstance(prompt, list) else [prompt or ""]
    chars = sum(len(part) for part in parts if isinstance(part, str))
    return chars, sum(1 if isinstance(part, int) else len(part) for part in parts if not isinstance(part, str))


def _tool_chars(request: GenerationRequest) -> int:
    """Return the length of the tools, which the chat template adds to the prompt, in characters."""
    return len(orjson.dumps(request.sampling["tools"])) if "tools" in request.sampling else 0
