"""How long a prompt and its answer may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.gateway.generation.request import (
    WHOLE_TOKENS,
    GenerationRequest,
    LengthLimits,
    max_prompt_tokens,
)
from server.gateway.routes.generate import request_of
from server.gateway.routes.requests import GenerateRequest
from tests.support.gateway import call_by

LIMITS = LengthLimits(max_prompt_chars=10, context_tokens=512, default_max_tokens=300)


def ask(**fields: Any) -> GenerationRequest:
    request = GenerateRequest(user_id="ada", **{"prompt": "hello", "max_tokens": 8} | fields)
    return request_of(call_by("tests"), request, request.turns, learn=False, patience_s=None)


def in_messages(*texts: str) -> dict[str, Any]:
    return {"prompt": None, "messages": [{"role": "user", "content": text} for text in texts]}


@pytest.mark.parametrize(
    ("fits", "exceeds", "param", "code"),
    [
        ({"prompt": "ä" * 10}, {"prompt": "x" * 11}, "prompt", "prompt_too_long"),
        (in_messages("x" * 5, "x" * 5), in_messages("x" * 6, "x" * 5), "messages", "prompt_too_long"),
        ({"max_tokens": 511}, {"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_what_is_known_to_be_too_much_is_refused(fits: Any, exceeds: Any, param: str, code: str) -> None:
    LIMITS.check(ask(**fits))
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.check(ask(**exceeds))
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"messages": [], "prompt": [[1] * 6, [2] * 5]}, "prompt has 11 token ids, at most 10 are allowed"),
        ({"messages": [], "prompt": ["x" * 6, "ä" * 5]}, "prompt has 11 characters, at most 10 are allowed"),
        (
            {"sampling": {"chat_template_kwargs": {"a": 1}}},
            "prompt has 5 characters and 7 bytes of tools and template arguments, at most 10 are allowed",
        ),
        (
            {"sampling": {"tools": ["ää"]}},
            "prompt has 5 characters and 8 bytes of tools and template arguments, at most 10 are allowed",
        ),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_with_what_it_holds(changed: dict[str, Any], found: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LIMITS.check(replace(ask(), **changed))
    assert caught.value.message == found


def test_an_answer_longer_than_the_room_is_refused() -> None:
    LIMITS.check_answer(ask(max_tokens=12), 500)
    with pytest.raises(InvalidRequest, match="Ask for at most 12"):
        LIMITS.check_answer(ask(max_tokens=13), 500)


def test_without_a_known_context_only_characters_count() -> None:
    unknown = replace(LIMITS, context_tokens=None)
    unknown.check(ask(max_tokens=10_000))
    unknown.check_answer(ask(max_tokens=10_000), 500)
    LIMITS.check_answer(ask(max_tokens=500), None)
    assert not unknown.allow_whole(ask(max_tokens=1), ask().messages)


def test_an_answer_comes_whole_when_it_is_short_and_surely_fits() -> None:
    asked, longest = ask(prompt="ä" * 20, max_tokens=8), ask(max_tokens=WHOLE_TOKENS)
    long = LengthLimits(100, 4096, WHOLE_TOKENS + 1)
    assert long.allow_whole(longest, longest.messages)
    for tokens in (WHOLE_TOKENS + 1, None):
        assert not long.allow_whole(replace(longest, max_tokens=tokens), longest.messages)
    for prompt in (None, "ä" * 20, ["ä" * 20], [1] * 40, [[1] * 40]):
        request = replace(asked, prompt=prompt, messages=[] if prompt else asked.messages)
        bound = max_prompt_tokens(request.messages, prompt or "")
        assert bound > 40
        assert replace(LIMITS, context_tokens=bound + 8).allow_whole(request, request.messages)
        assert not replace(LIMITS, context_tokens=bound + 7).allow_whole(request, request.messages)
        assert replace(LIMITS, context_tokens=bound).allow_whole(replace(request, max_tokens=None), request.messages)


def test_tokens_are_estimated_before_the_engine_has_counted_them() -> None:
    limits, asked = LengthLimits(10_000, 512, 300), ask(prompt="x" * 400, max_tokens=20)
    assert limits.estimate_tokens(asked) == 100 + 20
    assert limits.estimate_tokens(replace(asked, max_tokens=None)) == 100 + 256
    assert replace(limits, context_tokens=4096).estimate_tokens(replace(asked, max_tokens=None)) == 100 + 300
    assert limits.estimate_tokens(replace(asked, max_tokens=None, messages=[], prompt="x" * 400)) == 100 + 16
    twice = replace(asked, messages=[], prompt=[[1, 2, 3], [4, 5]], sampling={"n": 2})
    assert twice.sequences == 4
    assert limits.estimate_tokens(twice) == 5 + 4 * 20
    assert limits.estimate_tokens(replace(asked, messages=[], prompt=[1, 2, 3])) == 3 + 20
    assert limits.estimate_tokens(replace(asked, messages=[], prompt=["x" * 8, "x" * 8])) == 4 + 2 * 20
