"""Small clients for the MTA server's HTTP API; they need httpx and no other part of this project.

with Client("http://127.0.0.1:8000") as client:  # with MTA_API_KEY from the environment, or key="mta_…"
    client.put_profile("rosa", ["Dear friend,\\nThe first roses are open."])
    print(client.generate("rosa", "What should I do on a rainy Sunday?").text)

`AsyncClient` has the same methods for asyncio.
"""

from mta_client.async_client import AsyncClient
from mta_client.client import Client
from mta_client.results import (
    Anchor,
    Answer,
    Chunk,
    Erased,
    Feedback,
    Job,
    MtaError,
    Personalization,
    Profile,
    Rewritten,
    User,
    Worth,
)

__all__ = [
    "Anchor",
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "Erased",
    "Feedback",
    "Job",
    "MtaError",
    "Personalization",
    "Profile",
    "Rewritten",
    "User",
    "Worth",
]
