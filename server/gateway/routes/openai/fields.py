"""What becomes of each field of a request in OpenAI's shape. A field that is not listed is unknown, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from server.errors import InvalidRequest


class Fate(StrEnum):
    """What becomes of a field."""

    OURS = "ours"
    PASSED = "passed"
    IGNORED = "ignored"
    REFUSED = "refused"


FIELDS: Mapping[str, Fate] = {
    **dict.fromkeys(
        ("model", "user", "messages", "prompt", "stream", "stream_options", "history", "personalize", "strength"),
        Fate.OURS,
    ),
    **dict.fromkeys(
        (
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "n",
            "stop",
            "seed",
            "logprobs",
            "top_logprobs",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "logit_bias",
            "response_format",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "echo",
        ),
        Fate.PASSED,
    ),
    **dict.fromkeys(("store", "metadata", "service_tier"), Fate.IGNORED),
    **dict.fromkeys(
        (
            "cache_salt",
            "priority",
            "request_id",
            "session_id",
            "kv_transfer_params",
            "vllm_xargs",
            "chat_template",
        ),
        Fate.REFUSED,
    ),
}
"""`OURS`: read here. `PASSED`: the engine gets it as it came. `REFUSED`: it would steer the engine."""

PASSED = frozenset(name for name, fate in FIELDS.items() if fate is Fate.PASSED)


def by_the_table(body: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, Any]:
    """A request's fields without the ignored ones, and without nulls, which mean the same as nothing.

    Args:
        body: as it came.
        known: the fields of this kind of request; others are left in, for the validation to refuse.

    Raises:
        InvalidRequest: naming a field that steers the engine.
    """
    kept = {}
    for name, value in body.items():
        fate = FIELDS.get(name)
        if fate is Fate.REFUSED:
            raise InvalidRequest(
                f"{name} steers the engine, which is the server's own business: leave it out",
                param=name,
                code="refused_field",
            )
        if fate is not Fate.IGNORED and (value is not None or name not in known):
            kept[name] = value
    return kept
