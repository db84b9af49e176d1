"""A generation request, independent of its route, and the length limits of its prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import orjson

from bank.items.profile import Item
from server.errors import InvalidRequest
from server.gateway.access.keys import Caller
from server.gateway.engines.chat import Conversation, Prompt
from server.store.tenants.user_key import User, UserKeys

CONTINUATION_TOKENS = 16  # of a continued prompt whose request sets no length, as OpenAI documents it
WHOLE_TOKENS = 1024  # longest answer requested in one piece: until it is complete, a working engine looks hung
_TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to a conversation
_TEMPLATE_TOKENS_PER_MESSAGE = 16  # upper bound on what it adds to each message
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
    words: bool | Literal["auto"] = False  # whether to mix in the user's phrase table; `auto`: as the bank was measured
    history: int = 0  # number of the user's past items to add to the conversation
    max_tokens: int | None  # None for the default, or what the prompt leaves if that is less
    sampling: Mapping[str, Any]  # fields passed to the engine unchanged
    stream: bool
    users: UserKeys  # of the caller's tenant
    caller: Caller
    holdout: float = 0.0  # share of users who are answered one level lower, for comparison
    learnt: Item | None = None  # the last user message as an item, if it is to be learnt
    patience_s: float | None  # longest wait for a place in the engines, in seconds; None for the default
    user_param: str  # the three `_param` fields are names of HTTP fields, for error messages
    prompt_param: str
    max_tokens_param: str = "max_tokens"

    @property
    def wants_profile(self) -> bool:
        return self.user is not None and self.personalize is not Personalize.NONE

    @property
    def sequences(self) -> int:
        return len(prompts_of(self.prompt)) * int(self.sampling.get("n", 1))


@dataclass(frozen=True, slots=True)
class LengthLimits:
    max_prompt_chars: int  # maximum length of a conversation with its history; a token id or template byte is 1
    context_tokens: int | None  # the model's context length; None until an engine has reported it
    default_max_tokens: int  # of a conversation's answer whose request sets none

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request whose length alone exceeds the limits, before calling the store or an engine."""
        chars, token_ids = _prompt_length(request)
        lengths = {
            "characters": chars,
            "token ids": token_ids,
            "bytes of tools and template arguments": _template_bytes(request),
        }
        if sum(lengths.values()) > self.max_prompt_chars:
            told = " and ".join(f"{length} {unit}" for unit, length in lengths.items() if length)
            message = f"{request.prompt_param} has {told}, at most {self.max_prompt_chars} are allowed"
            raise InvalidRequest(message, param=request.prompt_param, code="prompt_too_long")
        if self.context_tokens is not None and (request.max_tokens or 0) >= self.context_tokens:
            raise _context_exceeded(
                request, f"leaves no room for a prompt: the context is {self.context_tokens} tokens"
            )

    def check_answer(self, request: GenerationRequest, prompt_tokens: int | None) -> None:
        """Refuse `max_tokens` that exceeds the context left by the prompt; vLLM would silently generate fewer tokens.

        Several prompts are not checked: the engine reports only their total and applies its own rule to each prompt.
        """
        asked, context = request.max_tokens, self.context_tokens
        if prompt_tokens is None or context is None or asked is None or len(prompts_of(request.prompt)) > 1:
            return
        if prompt_tokens + asked > context:
            raise _context_exceeded(
                request,
                f"exceeds the context: the prompt has {prompt_tokens} tokens and the model's context is {context}. "
                f"Ask for at most {context - prompt_tokens}",
            )

    def room_tokens(self, request: GenerationRequest) -> int | None:
        """Return the tokens surely left for a conversation with its history; None while the context is unknown."""
        if self.context_tokens is None:
            return None
        return self.context_tokens - self.answer_tokens(request, parts=2) - _template_bytes(request)

    def estimate_tokens(self, request: GenerationRequest) -> int:
        """Estimate the tokens of the prompt, without history, and of all its answers."""
        chars, token_ids = _prompt_length(request)
        text_tokens = (chars + _template_bytes(request)) // _CHARS_PER_TOKEN
        return text_tokens + token_ids + self.answer_tokens(request, parts=2) * request.sequences

    def allow_whole(self, request: GenerationRequest, messages: Conversation) -> bool:
        """Return whether to request an answer in one piece: it is short and fits with any tokenisation of the prompt.

        Other answers are streamed, and refused at the first token if they do not fit. The default always fits.
        """
        if request.max_tokens is None:
            return self.answer_tokens(request) <= WHOLE_TOKENS
        if self.context_tokens is None or request.max_tokens > WHOLE_TOKENS:
            return False
        prompt_tokens = max_prompt_tokens(messages, request.prompt or "") + _template_bytes(request)
        return prompt_tokens + request.max_tokens <= self.context_tokens

    def answer_tokens(self, request: GenerationRequest, *, parts: int = 1) -> int:
        """Return `max_tokens` or its default, at most one of so many parts of the context.

        An engine lowers it to what the prompt leaves.
        """
        if request.max_tokens is not None:
            return request.max_tokens
        default = self.default_max_tokens if request.prompt is None else CONTINUATION_TOKENS
        return default if self.context_tokens is None else min(default, self.context_tokens // parts)


def _context_exceeded(request: GenerationRequest, why: str) -> InvalidRequest:
    param = request.max_tokens_param
    return InvalidRequest(f"{param} {request.max_tokens} {why}", param=param, code="context_length_exceeded")


def prompts_of(prompt: Prompt | None) -> list[Any]:
    """Return the prompts of a request, each a text or token ids; `[None]` for a conversation."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def chars_of(messages: Conversation) -> int:
    return sum(len(_prompt_text(message)) for message in messages)


def max_prompt_tokens(messages: Conversation, prompt: Prompt = "") -> int:
    """Return an upper bound on the tokens of a conversation or prompt: each token covers at least one byte."""
    texts = [*map(_prompt_text, messages), *prompts_of(prompt)]
    text_tokens = sum(size_bytes(text) if isinstance(text, str) else len(text) for text in texts)
    return text_tokens + _TEMPLATE_TOKENS_PER_MESSAGE * len(messages) + _TEMPLATE_TOKENS


def size_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _prompt_text(message: dict[str, Any]) -> str:
    text = "".join(message.get(field, "") for field in ("content", "reasoning", "name", "tool_call_id"))
    return text + orjson.dumps(message["tool_calls"]).decode() if "tool_calls" in message else text


def _prompt_length(request: GenerationRequest) -> tuple[int, int]:
    """Return the number of characters and of token ids in a request's messages and prompts."""
    prompts = prompts_of(request.prompt)
    prompt_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    token_ids = sum(len(prompt) for prompt in prompts if isinstance(prompt, list))
    return chars_of(request.messages) + prompt_chars, token_ids


def _template_bytes(request: GenerationRequest) -> int:
    """Return the size of the JSON that the chat template may add to the prompt: at most one token per byte."""
    given = (request.sampling.get(name) for name in ("tools", "chat_template_kwargs"))
    return sum(len(orjson.dumps(value)) for value in given if value)
