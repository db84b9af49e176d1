"""What the fake engine says: vLLM's shapes, errors and token counts."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

from aiohttp import web

from bench.rig.engine import KEY
from tests.support.fake_engine.knobs import Seen

WORDS = ("sea", "board", "rose", "queen", "rye", "steam", "plan", "salt", "wave", "knight", "crumb", "rail")


def authorised(request: web.Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {KEY}"


def error_answer(status: int, message: str, param: str | None = None) -> web.Response:
    error = {"message": message, "type": "Error", "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


def template_refusal(messages: list[dict[str, str]]) -> str | None:
    """What the chat template of `bench.rig.tiny` raises."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return "the system message must come first"
    twice = next((role for role, following in pairwise(roles) if role == following), None)
    return f"after {twice} comes another role" if twice else None


def prompt_tokens(body: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in body["messages"])


def usage_of(seen: Seen) -> dict[str, int]:
    prompt = prompt_tokens(seen.body)
    return {"prompt_tokens": prompt, "completion_tokens": seen.tokens, "total_tokens": prompt + seen.tokens}


def words_of(body: dict[str, Any], context: int) -> list[str]:
    """The answer, cut to what the context leaves, as vLLM cuts it: without a word."""
    length = min(body["max_tokens"], context - prompt_tokens(body))
    digest = hashlib.sha256(f"{body['model']}\0{body['messages'][-1]['content']}".encode()).digest()
    return [f"{WORDS[digest[i % 32] % len(WORDS)]} " for i in range(length)]


def chunk(delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    content = {"object": "chat.completion.chunk", "choices": [choice], **more}
    return b"data: " + json.dumps(content).encode() + b"\n\n"
