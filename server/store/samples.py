"""What gateway and worker agree on about adapting: samples and configuration, as values and as bytes."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import orjson

Kind = Literal["lora", "core"]
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One example of how a user wants to be answered.

    Attributes:
        messages: the conversation, ending with the user's turn.
        output: what the answer should have been.
    """

    messages: Messages
    output: str


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """How a user adapter is trained; recorded with the job, so that the same job gives the same bytes.

    Attributes:
        kind: what is trained (`adapters/user_adapter.py`).
        rank: of a `lora`; a `core` has the fused adapter's.
        steps: most optimiser steps of one run.
        learning_rate: after the warm-up.
        holdout: share of the samples that is kept aside where there are many.
        seed: of everything random.
    """

    kind: Kind = "core"
    rank: int = 2
    steps: int = 8
    learning_rate: float = 2e-2
    holdout: float = 0.2
    seed: int = 0


def encode_sample(sample: Sample) -> bytes:
    """A sample as JSON."""
    return orjson.dumps({"messages": list(sample.messages), "output": sample.output})


def decode_sample(raw: bytes) -> Sample:
    """The inverse of `encode_sample`."""
    value = orjson.loads(raw)
    return Sample(value["messages"], value["output"])


def encode_config(config: AdaptConfig) -> str:
    """A configuration as JSON."""
    return orjson.dumps(asdict(config)).decode()


def decode_config(text: str) -> AdaptConfig:
    """The inverse of `encode_config`."""
    return AdaptConfig(**orjson.loads(text))


def new_adapter_id() -> str:
    """26 characters of base32: 128 random bits, the alphabet and the length that recipe names take."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()
