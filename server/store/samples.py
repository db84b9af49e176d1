"""What gateway and worker agree on about adapting: samples and configuration, as values and as bytes."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import orjson

Kind = Literal["lora", "core"]
CORE_STEPS, CORE_LEARNING_RATE = 16, 2e-2
"""A core turns what the fused adapter has, and that is small."""

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

    The numbers are those with which ten samples of people outside a bank helped their later items most, on two tasks
    together (docs/quality.md).

    Attributes:
        kind: what is trained (`adapters/user_adapter.py`).
        rank: of a `lora`; a `core` has the fused adapter's.
        steps: most optimiser steps of one run; it ends before when nothing more is learnt.
        learning_rate: after the warm-up.
        holdout: share of the samples that is kept aside where there are many.
        strength: of the anchors beneath it, as a share of theirs when merged; below 1 only beside a common row.
        seed: of everything random.
    """

    kind: Kind = "lora"
    rank: int = 2
    steps: int = 8
    learning_rate: float = 1e-3
    holdout: float = 0.2
    strength: float = 0.5
    seed: int = 0


def default_config(room: int, common: bool, kind: Kind | None = None) -> AdaptConfig:
    """What a job is trained with where nothing else is asked for.

    Args:
        room: the rank that the bank leaves for users; without any, only a core can be served.
        common: whether the bank has a common row.
        kind: if one is asked for.
    """
    if (kind or ("lora" if room else "core")) == "core":
        return AdaptConfig(kind="core", steps=CORE_STEPS, learning_rate=CORE_LEARNING_RATE, strength=1.0)
    usual = AdaptConfig()
    return replace(usual, rank=max(1, min(usual.rank, room)), strength=usual.strength if common else 1.0)


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
