"""The examples in the API's schema. Nothing in `GENERATED` is null: FastAPI leaves null fields out."""

from __future__ import annotations

from server.gateway.generation.personalizer import Level
from server.gateway.http.streaming import DONE, event
from server.gateway.routes.answers import (
    AnchorAnswer,
    GenerateAnswer,
    HeldOut,
    JobAnswer,
    PersonalizationAnswer,
    Progress,
    Usage,
)
from server.gateway.routes.chunks import Chunk
from server.store.jobs import JobState

GENERATED = GenerateAnswer(
    id="gen-1b0330fa255959863cff0464",
    text="up early, straight to the water",
    finish_reason="stop",
    usage=Usage(prompt_tokens=17, completion_tokens=9, total_tokens=26),
    personalization=PersonalizationAnswer(
        level=Level.MERGED,
        recipe="mta1:9f2c41d0:shared:c+a03*803+a17*197",
        source="signature",
        anchors=[
            AnchorAnswer(id="a03", weight=0.803, similarity=0.9142, gain=0.0613),
            AnchorAnswer(id="a17", weight=0.197, similarity=0.2245, gain=0.0397),
        ],
        history=0,
        history_reason="the user's past items could not be read in time",
        reason="the engine cannot serve this user's adapter",
        timings_ms={"profile": 0.3, "recipe": 0.1, "engine": 160.2, "total": 161.4},
    ),
)

_WORD: Chunk = {
    "id": GENERATED.id,
    "object": "chat.completion.chunk",
    "created": 1790000000,
    "model": "mta1:9f2c41d0:shared:c+a03*803+a17*197",
    "choices": [{"index": 0, "delta": {"content": "up"}, "finish_reason": None}],
}
_FIRST: Chunk = {
    **_WORD,
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
    "personalization": GENERATED.personalization,
}
_LAST: Chunk = {
    **_WORD,
    "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    "usage": GENERATED.usage,
    "timings_ms": GENERATED.personalization.timings_ms,
}
STREAMED = b"".join((*map(event, (_FIRST, _WORD, _LAST)), DONE)).decode()

_JOB = JobAnswer(
    id="q5kxv7d2m4zr3yh6wncb2tpaei.1871290335",
    state=JobState.RUNNING,
    config={"kind": "lora", "rank": 2, "steps": 16, "learning_rate": 0.001, "holdout": 0.2, "strength": 0.5},
    progress=Progress(
        step=4,
        steps=24,
        phase="fold 1 of 2",
        loss=[(1, 2.41), (2, 2.2), (3, 2.06), (4, 1.93)],
        held_out=[(0, 2.38), (2, 2.21), (4, 2.04)],
    ),
    held_out=HeldOut(before=None, after=None),
    created_at="2026-11-27T08:03:41.208+00:00",
    started_at="2026-11-27T08:03:41.733+00:00",
    ended_at=None,
    tries=1,
    adapter=None,
    error=None,
)
FOLLOWED = event(_JOB, "job").decode()
