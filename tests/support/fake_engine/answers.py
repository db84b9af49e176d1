"""What the fake engine says: vLLM's shapes, errors and token counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import Any

from aiohttp import web

from bench.rig.engine import KEY
from tests.support.fake_engine.knobs import Seen

WORDS = ("sea", "board", "rose", "queen", "rye", "steam", "plan", "salt", "wave", "knight", "crumb", "rail")
COMPLETION_TOKENS = 16
"""Longest continuation of a prompt, unless the request says otherwise."""


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


def options_refusal(body: dict[str, Any]) -> str | None:
    """What vLLM says of options that do not go together, or with how it was started."""
    if body.get("tool_choice", "auto" if "tools" in body else "none") == "auto":
        return '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    if body.get("n", 1) > 1 and body.get("temperature") == 0:
        return "n must be 1 when using greedy sampling"
    return None


def prompts_of(body: dict[str, Any]) -> list[Any]:
    """What is to be answered: the contents of a conversation, or each prompt, as a text or as token ids."""
    if "messages" in body:
        return [[message.get("content") or "" for message in body["messages"]]]
    prompt = body["prompt"]
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def prompt_tokens(body: dict[str, Any]) -> int:
    in_contents = "messages" in body
    return sum(sum(map(len, one)) if in_contents else len(one) for one in prompts_of(body))


def choices_of(body: dict[str, Any]) -> range:
    return range(len(prompts_of(body)) * body.get("n", 1))


def usage_of(seen: Seen) -> dict[str, int]:
    prompt, completion = prompt_tokens(seen.body), seen.tokens * len(choices_of(seen.body))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def words_of(body: dict[str, Any], context: int) -> list[str]:
    """The answer, cut to what the context leaves, as vLLM cuts it: without a word."""
    left = context - prompt_tokens(body)
    most = COMPLETION_TOKENS if "prompt" in body else left
    most = body.get("max_completion_tokens", body.get("max_tokens", most))
    said = prompts_of(body)[-1] if "prompt" in body else body["messages"][-1].get("content")
    digest = hashlib.sha256(f"{body['model']}\0{said}".encode()).digest()
    return [f"{WORDS[digest[i % 32] % len(WORDS)]} " for i in range(min(most, left))]


def whole(seen: Seen, words: list[str], finish_reasons: Sequence[str]) -> dict[str, Any]:
    text = "".join(words)
    said = {"text": text} if "prompt" in seen.body else {"message": {"role": "assistant", "content": text}}
    choices = [
        {"index": index, **said, "logprobs": _logprobs(seen.body, words), "finish_reason": reason}
        for index, reason in zip(choices_of(seen.body), cycle(finish_reasons), strict=False)
    ]
    kind = "text_completion" if "prompt" in seen.body else "chat.completion"
    return _named(seen, kind) | {"choices": choices, "usage": usage_of(seen), "kv_transfer_params": {"host": "inner"}}


def chunks(seen: Seen, word: str | None, finish_reasons: Sequence[str | None] = (None,), **more: Any) -> bytes:
    """A chunk for each choice: its opening if `word` is empty, its end if it is None."""
    ends = zip(choices_of(seen.body), cycle(finish_reasons), strict=False)
    return b"".join(chunk(seen, index, word, reason, **more) for index, reason in ends)


def chunk(
    seen: Seen, index: int | None, word: str | None = None, finish_reason: str | None = None, **more: Any
) -> bytes:
    """One choice's; without one what follows the last choice."""
    chat = "messages" in seen.body
    delta: dict[str, Any] = {} if word is None else {"content": word}
    if word == "":
        delta |= {"role": "assistant"}
    said = {"delta": delta} if chat else {"text": word or ""}
    logprobs = _logprobs(seen.body, [word]) if word else None
    choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
    kind = "chat.completion.chunk" if chat else "text_completion"
    content = _named(seen, kind) | {"choices": [] if index is None else [choice]} | more
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _named(seen: Seen, kind: str) -> dict[str, Any]:
    name = f"chatcmpl-{seen.headers.get('X-Request-ID')}"
    return {"id": name, "object": kind, "created": 1790000000, "model": seen.body["model"]}


def _logprobs(body: dict[str, Any], words: list[str]) -> dict[str, Any] | None:
    """As many as there are words, where they are asked for."""
    if not body.get("logprobs"):
        return None
    if "prompt" in body:
        return {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": [], "text_offset": []}
    return {"content": [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in words]}
