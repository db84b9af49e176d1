"""A small client for the MTA server's HTTP API; it needs httpx and no other part of this project.

with Client("http://127.0.0.1:8000") as client:  # with MTA_API_KEY from the environment, or key="mta_…"
    client.put_profile("rosa", ["Dear friend,\\nThe first roses are open."])
    print(client.generate("rosa", "What should I do on a rainy Sunday?").text)
"""

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
    User,
    Worth,
)

__all__ = [
    "Anchor",
    "Answer",
    "Chunk",
    "Client",
    "Erased",
    "Feedback",
    "Job",
    "MtaError",
    "Personalization",
    "Profile",
    "User",
    "Worth",
]
