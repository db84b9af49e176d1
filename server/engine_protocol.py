"""What an engine and its clients agree on: names, the key, and the private routes.

The routes are called on each engine directly, never through a router; else clients speak OpenAI's protocol with a
recipe's name as the model. Gateway, supervisor and engine do not import each other.
"""

from __future__ import annotations

PLUGIN = "mta"  # the name of both of our vLLM entry points, and the value of `VLLM_PLUGINS`
BASE_MODEL = "base"  # the name under which engines serve the base model

STATUS = "/mta/v1/status"
"""GET: what the engine serves: `banks`, their fingerprints, `max_model_len`, in tokens, `max_num_seqs`, how many
sequences a batch holds, `slots`, how many recipes it mixes, and, where known, `slots_taken`, `prepares` and `fuses`."""

RESIDENT = "/mta/v1/resident"  # GET: what the workers hold; for operators
DROP = "/mta/v1/drop"  # POST `{"user_key"}`: drop a user's adapters


def key_header(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
