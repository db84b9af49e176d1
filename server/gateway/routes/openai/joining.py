"""A whole answer out of the chunks of a streamed one: its places in the engines came back one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PIECEWISE = frozenset(("index", "delta", "text", "logprobs"))


def joined(chunks: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The answer that an engine would have given in one piece.

    Args:
        chunks: all of them, of one choice or several, in any order between the choices; the last has the usage.
        kind: the answer's `object`.
    """
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            if (choice := choices.get(piece["index"])) is None:
                said = {"message": {"role": "assistant", "content": "", "refusal": None}}
                choice = choices[piece["index"]] = {
                    "index": piece["index"],
                    **(said if "delta" in piece else {"text": ""}),
                    "logprobs": None,
                    "finish_reason": None,
                }
            _add(choice, piece)
    common = {name: value for name, value in chunks[0].items() if name != "choices"}
    ordered = [choices[index] for index in sorted(choices)]
    return common | {"object": kind, "choices": ordered, "usage": chunks[-1].get("usage")}


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, said in piece.get("delta", {}).items():
        if isinstance(said, str) and name != "role":
            choice["message"][name] = (choice["message"].get(name) or "") + said
    if "text" in piece:
        choice["text"] += piece["text"]
    for name, values in (piece.get("logprobs") or {}).items():
        known = choice["logprobs"] = choice["logprobs"] or {}
        known[name] = [*(known.get(name) or ()), *values] if isinstance(values, list) else values
    choice |= {name: value for name, value in piece.items() if value is not None and name not in _PIECEWISE}
