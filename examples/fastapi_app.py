"""A FastAPI app that suggests replies in its users' own manner, and learns from what they send instead.

pip install fastapi uvicorn mta-server
MTA_URL=http://localhost:8000 uvicorn fastapi_app:app --port 9000
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Request
from pydantic import BaseModel

from mta_client import AsyncClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient(os.environ.get("MTA_URL", "http://localhost:8000"), key=os.environ.get("MTA_KEY")) as mta:
        app.state.mta = mta
        yield


app = FastAPI(lifespan=lifespan)


def mta_of(request: Request) -> AsyncClient:
    return request.app.state.mta


Mta = Annotated[AsyncClient, Depends(mta_of)]
SignedIn = Annotated[str, Header(alias="X-Signed-In", description="Stands for the app's own session.")]


class Suggestion(BaseModel):
    answer_id: str
    text: str
    level: str


class Sent(BaseModel):
    answer_id: str
    message: str
    suggested: str
    text: str


@app.post("/texts")
async def remember(texts: list[str], user: SignedIn, mta: Mta) -> dict[str, int]:
    """Tell the server what the user has written so far; their next suggestion is already theirs."""
    return {"items": (await mta.add_items(user, texts)).kept}


@app.post("/suggestions")
async def suggest(message: str, user: SignedIn, mta: Mta) -> Suggestion:
    answer = await mta.generate(user, message, max_tokens=60)
    return Suggestion(answer_id=answer.id, text=answer.text, level=answer.personalization.level)


@app.post("/sent")
async def sent(reply: Sent, user: SignedIn, mta: Mta) -> dict[str, str | None]:
    """Say what became of a suggestion: a text that was sent instead is what the user's adapter learns from."""
    said = await mta.feedback(user, reply.answer_id, final=reply.text, input=reply.message, text=reply.suggested)
    return {"outcome": said.outcome}
