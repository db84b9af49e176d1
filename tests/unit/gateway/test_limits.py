"""How long a prompt and its answer may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.gateway.access.keys import Caller
from server.gateway.generation.request import WHOLE_TOKENS, GenerationRequest, LengthLimits, max_prompt_tokens
from server.gateway.routes.generate import request_of
from server.gateway.routes.requests import GenerateRequest
from server.store.tenants.user_key import UserKeys

LIMITS = LengthLimits(prompt_chars=10, context=512)


def ask(**fields: Any) -> GenerationRequest:
    request = GenerateRequest(user_id="ada", **{"prompt": "hello", "max_tokens": 8} | fields)
    return request_of(request, UserKeys("a secret for tests only", "tests"), Caller("tests", "", frozenset()))


def in_messages(*texts: str) -> dict[str, Any]:
    return {"prompt": None, "messages": [{"role": "user", "content": text} for text in texts]}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": "x" * 11}, "prompt", "prompt_too_long"),
        (in_messages("x" * 6, "x" * 5), "messages", "prompt_too_long"),
        ({"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_what_is_known_to_be_too_much_is_refused(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.check(ask(**fields))
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("fields", [{"prompt": "ä" * 10}, in_messages("x" * 5, "x" * 5), {"max_tokens": 511}])
def test_what_is_just_within_is_taken(fields: dict[str, Any]) -> None:
    LIMITS.check(ask(**fields))


def test_an_answer_beyond_what_the_prompt_leaves_is_refused_with_what_would_fit() -> None:
    LIMITS.check_answer(ask(max_tokens=12), 500)
    with pytest.raises(InvalidRequest, match="Ask for at most 12"):
        LIMITS.check_answer(ask(max_tokens=13), 500)
    LIMITS.check_answer(ask(max_tokens=500), None)


def test_while_no_engine_has_told_its_context_only_characters_count() -> None:
    unknown = LengthLimits(prompt_chars=10, context=None)
    unknown.check(ask(max_tokens=10_000))
    unknown.check_answer(ask(max_tokens=10_000), 500)
    assert not unknown.allow_whole(ask().messages, 1)


def test_an_answer_comes_whole_when_it_is_short_and_surely_fits() -> None:
    messages = ask(prompt="ä" * 20).messages
    room = 4096 - max_prompt_tokens(messages)
    assert max_prompt_tokens(messages) > 40
    assert LengthLimits(100, 4096).allow_whole(messages, WHOLE_TOKENS)
    assert not LengthLimits(100, 4096).allow_whole(messages, WHOLE_TOKENS + 1)
    assert LengthLimits(100, 4096 - room + 8).allow_whole(messages, 8)
    assert not LengthLimits(100, 4096 - room + 7).allow_whole(messages, 8)


def test_tokens_are_estimated_before_the_engine_has_counted_them() -> None:
    limits, asked = LengthLimits(prompt_chars=10_000, context=512), ask(prompt="x" * 400, max_tokens=20)
    assert limits.tokens(asked) == 100 + 20
    assert limits.tokens(replace(asked, max_tokens=None)) == 100 + 256
    twice = replace(asked, messages=[], prompt=[[1, 2, 3], [4, 5]], sampling={"n": 2})
    assert twice.sequences == 4
    assert limits.tokens(twice) == 5 + 4 * 20
    assert limits.tokens(replace(asked, messages=[], prompt=[1, 2, 3])) == 3 + 20
    assert limits.tokens(replace(asked, messages=[], prompt=["x" * 8, "x" * 8])) == 4 + 2 * 20
