"""Ids of answers: what the client gets can be attributed for 7 days and forged by nobody, and nothing of it is stored.

An id is the request's id, a dot, and the base64url of an ending::

    hour u24 · level and arm u8 · hash of the recipe u32 · hash of the user's epoch u48 · MAC (16 bytes)

The MAC covers the request's id, the ending and the user; its key is the tenant's. No user can be read from an id. Logs
and engines see the request's id alone. An id outlasts the tombstone that it was given under, but no later erasure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass

from adapters.errors import excerpt
from server.clock import this_hour
from server.errors import Gone, NotFound
from server.gateway.experiments.arms import Arm, Level
from server.store.tenants.user_key import User, UserKeys

VALID_HOURS = 7 * 24  # at most as long as an erasure's tombstone keeps the epoch
_HOUR_BYTES, _RECIPE_BYTES, _EPOCH_BYTES = 3, 4, 6
_HEAD_BYTES = _HOUR_BYTES + 1 + _RECIPE_BYTES + _EPOCH_BYTES
_LEVELS, _ARMS = tuple(Level), tuple(Arm)


@dataclass(frozen=True, slots=True)
class AnswerNote:
    request_id: str
    hour: int  # since 1970
    level: Level  # of the adapter that spoke in the end
    arm: Arm


def answer_id(
    users: UserKeys, user: User, epoch: str, request_id: str, *, level: Level, arm: Arm, recipe: str | None
) -> str:
    """Return the id that the client gets. `recipe` is the public name, None for the base model."""
    kind = _LEVELS.index(level) * len(_ARMS) + _ARMS.index(arm)
    hashes = _hash(recipe or "", _RECIPE_BYTES) + _hash(_unmarked(epoch), _EPOCH_BYTES)
    head = this_hour().to_bytes(_HOUR_BYTES) + bytes([kind]) + hashes
    ending = head + users.sign_answer(user, head, request_id.encode())[0]
    return f"{request_id}.{base64.urlsafe_b64encode(ending).decode()}"


def read_answer_id(users: UserKeys, user: User, epoch: str, text: str) -> AnswerNote:
    """Return what an id says.

    Raises NotFound for an id of another user or tenant, from before an erasure (`epoch` is the present one) and for a
    forged one, Gone for one from 7 days ago, counted in whole hours.
    """
    request_id, _, encoded = text.rpartition(".")
    try:
        ending = base64.b64decode(encoded.encode(), b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _unknown(text) from None
    head, mac = ending[:_HEAD_BYTES], ending[_HEAD_BYTES:]
    macs = users.sign_answer(user, head, request_id.encode("utf-8", "replace"))
    is_ours = any(hmac.compare_digest(mac, made) for made in macs)
    if not is_ours or ((epoch := _unmarked(epoch)) and not head.endswith(_hash(epoch, _EPOCH_BYTES))):
        raise _unknown(text)
    hour, kind = int.from_bytes(head[:_HOUR_BYTES]), head[_HOUR_BYTES]
    if this_hour() - hour >= VALID_HOURS:
        raise Gone(f"answer {excerpt(text)} was given 7 days ago: it takes no feedback any more", param="answer")
    level, arm = _LEVELS[kind // len(_ARMS)], _ARMS[kind % len(_ARMS)]
    return AnswerNote(request_id, hour, level, arm)


def _unmarked(epoch: str) -> str:  # without the mark that a write left
    return epoch.partition("+")[0]


def _hash(text: str, size: int) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:size]


def _unknown(text: str) -> NotFound:
    return NotFound(
        f"answer {excerpt(text)} is no answer to this user: send the `id` of an answer to the same user_id, whole. The "
        "user's data may have been erased since; answers with `personalize: none` take no feedback",
        param="answer",
        code="unknown_answer",
    )
