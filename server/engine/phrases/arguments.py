"""What gateways send along with a request: the user's phrase table, and the trust in it."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING

from bank.lookup.phrases import LONGEST, TrustedPhrases, decode_phrases
from server.engine_protocol import PHRASES, TRUST

if TYPE_CHECKING:
    from vllm import SamplingParams


def phrases_of(params: SamplingParams) -> TrustedPhrases | None:
    """Return a request's phrases, None if it has none; raise ValueError if they cannot be mixed in."""
    arguments = params.extra_args or {}
    if PHRASES not in arguments:
        return None
    table, trust = decode_phrases(b64decode(arguments[PHRASES], validate=True)), arguments.get(TRUST)
    if not isinstance(trust, list) or len(trust) != LONGEST or not all(0 <= each < 1 for each in trust):
        raise ValueError(f"{TRUST} must be {LONGEST} numbers from 0 to below 1, got {trust!r}")
    return TrustedPhrases(table, trust)
