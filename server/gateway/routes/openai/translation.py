"""What other formats share: a conversation of their items becomes chat messages, and the chat answer their blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest
from server.gateway.parts import Call
from server.gateway.routes.openai.requests import TranslatedRequest
from server.gateway.routes.openai.routes import ModelResponse

Turn = dict[str, Any]
"""A chat message, or a part of one."""


def tool_call(call_id: str, name: str, arguments: str) -> Turn:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def conversation_of(turns: Iterable[Turn]) -> list[Turn]:
    """Join what one side says in a row into one message, as chat templates want it; each tool's result is its own."""
    messages: list[Turn] = []
    for turn in turns:
        if not messages or turn["role"] == "tool" or turn["role"] != messages[-1]["role"]:
            messages.append(dict(turn))
            continue
        last = messages[-1]
        for name in turn.keys() - {"role"}:
            old, new = last.get(name), turn[name]
            if old and new:
                new = old + ("\n\n" if isinstance(new, str) else []) + new
            last[name] = new or old
    return messages


class Kind(StrEnum):
    """What a block is; the values are fields of a chat message."""

    REASONING = "reasoning"
    TEXT = "content"
    CALL = "tool_calls"


@dataclass(slots=True, eq=False)
class AnswerBlock:
    """A part of an answer: reasoning, text, or the call of a tool."""

    kind: Kind
    index: int  # within the answer
    call_id: str = ""
    name: str = ""  # of the tool
    ended: bool = False
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, or the arguments of the call as JSON."""
        return "".join(self.pieces)


Step = tuple[AnswerBlock, str | None]
"""A block and its next text: empty when the block begins, None when it ends."""


class TranslatedResponse(ModelResponse):
    """A chat answer in another format, as blocks one after the other."""

    def __init__(self, call: Call, generation: GenerationRequest, body: TranslatedRequest) -> None:
        super().__init__(call, generation, body)
        self.blocks: list[AnswerBlock] = []
        self.finish_reason: str | None = None
        self.stop: str | None = None  # the stop text that ended the answer
        self._place: tuple[Kind, int] | None = None  # of the block that has begun and not ended

    @abstractmethod
    def value(self, answer: Answer) -> dict[str, Any]:
        """Return the answer with the blocks so far."""

    async def whole(self, answer: Answer) -> bytes:
        async for _ in self.steps(answer):
            pass
        return orjson.dumps(self.value(answer))

    async def steps(self, answer: Answer) -> AsyncIterator[Step]:
        async for _, value in answer.pieces():
            for choice in value["choices"]:
                for step in self.read(choice):
                    yield step
        for step in self.end():
            yield step

    def read(self, choice: Mapping[str, Any]) -> Iterator[Step]:
        """Read a chat answer's choice: its message, or the delta of a chunk."""
        said = choice.get("delta") or choice.get("message") or {}
        for kind in (Kind.REASONING, Kind.TEXT):
            if text := said.get(kind):
                yield from self._add((kind, 0), text)
        for position, call in enumerate(said.get(Kind.CALL) or ()):
            function = call.get("function") or {}
            named = call.get("id") or "", function.get("name") or ""
            yield from self._add((Kind.CALL, call.get("index", position)), function.get("arguments") or "", *named)
        if reason := choice.get("finish_reason"):
            stop = choice.get("stop_reason")
            self.finish_reason, self.stop = reason, stop if isinstance(stop, str) else None

    def end(self) -> Iterator[Step]:
        """End the answer, which has at least one block."""
        if not self.blocks:
            yield from self._add((Kind.TEXT, 0), "")
        yield from self._end_block()

    def _add(self, block_id: tuple[Kind, int], text: str, call_id: str = "", name: str = "") -> Iterator[Step]:
        if block_id != self._place:
            yield from self._end_block()
            self._place = block_id
            self.blocks.append(AnswerBlock(block_id[0], len(self.blocks), call_id, name))
            yield self.blocks[-1], ""
        if text:
            self.blocks[-1].pieces.append(text)
            yield self.blocks[-1], text

    def _end_block(self) -> Iterator[Step]:
        if self._place:
            self._place, self.blocks[-1].ended = None, True
            yield self.blocks[-1], None
