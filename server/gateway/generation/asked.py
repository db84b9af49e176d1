"""What is asked of the generator, whichever route it came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.gateway.access.caller import Caller
from server.gateway.engines.chat import Conversation, Prompt
from server.gateway.http.requests import Personalize
from server.store.tenants.user_key import User


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for an answer, well-formed.

    Attributes:
        id_prefix: how the answer's id begins.
        user: who asks; None for nobody in particular.
        personalize: how personal the answer is to be.
        strength: of the anchors beside the common row, relative to the bank's own.
        messages: the conversation; empty where a prompt is continued.
        prompt: what is continued as it is, without a chat template; None for a conversation.
        history: how many of the user's past items the conversation gets.
        max_tokens: longest answer; None for what the context leaves.
        sampling: what the engine gets as it came.
        stream: whether the client wants the answer in pieces.
        splittable: whether the engine may send in pieces what the client wants whole.
        cache_salt: the tenant's.
        caller: whose request it is.
        patience_s: how long it may wait for a place in the engines; None for as long as is usual.
        user_param: the client's name for the user, for errors.
        prompt_param: for the conversation or prompt.
        max_tokens_param: for `max_tokens`.
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
    def has_many_prompts(self) -> bool:
        """Whether several prompts are continued at once."""
        return self._prompts > 1

    @property
    def comes_in_pieces(self) -> bool:
        """Whether the engine sends in pieces what the client may want whole: its places come back one by one.

        Not with tools: what a model says to them the engine reads better as a whole.
        """
        return self.stream or (self.sequences > 1 and "tools" not in self.sampling)

    @property
    def sequences(self) -> int:
        """How many answers are generated."""
        return self._prompts * int(self.sampling.get("n", 1))

    @property
    def _prompts(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else 1
