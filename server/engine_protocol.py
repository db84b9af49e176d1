"""What an engine and its clients agree on: names, the key, and the private routes.

Gateway and supervisor ask, the engine answers, and neither side imports the other. Apart from the private routes, which
are called on each engine directly and never through a router, they speak OpenAI's protocol with a recipe's name as the
model.
"""

from __future__ import annotations

PLUGIN = "mta"
"""The name under which both of our vLLM entry points are registered, and the value of `VLLM_PLUGINS`."""

BASE_MODEL = "base"
"""The name under which engines serve the base model."""

PRIVATE = "/mta/v1"

STATUS = f"{PRIVATE}/status"
"""GET: what the engine serves. The gateway reads `banks`, their fingerprints, `max_model_len`, in tokens,
`max_num_seqs`, how many sequences a batch holds, and `slots`, how many recipes it mixes: it sends no more than the
fewer of the two. It shows, where they are told, of the slots those `slots_taken`, and of all `prepares` those that were
`fuses`."""

RESIDENT = f"{PRIVATE}/resident"
"""GET: what the workers hold; for operators."""

DROP = f"{PRIVATE}/drop"
"""POST `{"user_key"}`: drop a user's adapters."""


def key_header(key: str | None) -> dict[str, str]:
    """The header that carries an engine's key; empty without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}
