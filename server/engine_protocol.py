"""Names, key header and private routes shared by the engine and its clients, which do not import each other.

Clients call these routes on each engine directly, never through a router. All other calls use OpenAI's protocol, with
the recipe's name as the model.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from bank.lookup.phrases import TrustedPhrases
from bank.manifest import BASE

PLUGIN = "mta"  # name of both vLLM entry points, and value of `VLLM_PLUGINS`
BASE_MODEL = BASE  # model name under which engines serve the base model

STATUS = "/mta/v1/status"
"""GET: the engine's `banks` (fingerprints), `prompts` (hashes), `dtype` or quantisation, `max_model_len` (tokens),
`max_num_seqs` (sequences per batch), `slots` (recipes per batch), `sampling` (of requests that set none, in OpenAI's
and vLLM's fields) and, if known, `slots_taken`, `prepares` and `fuses`. Older engines report no `prompts`, `sampling`
or `dtype`."""

RESIDENT = "/mta/v1/resident"  # GET: adapters that the workers hold, for operators
DROP = "/mta/v1/drop"  # POST `{"user_key"}`: drop the adapters of a user

PHRASES, TRUST = "mta_phrases", "mta_trust"
"""Fields of a request's `vllm_xargs`: a phrase table in base64, and the trust in it by length of a suffix."""

SHARED = "mta_shared"  # another one: the number of a prompt's first tokens that are shared, which the engine counts


def phrase_arguments(phrases: TrustedPhrases) -> dict[str, Any]:
    return {PHRASES: b64encode(phrases.table.tobytes()).decode(), TRUST: list(phrases.trust)}


def key_header(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
