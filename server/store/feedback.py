"""Feedback: what a person did with each answer, and the text sent instead (keys: `server/store/redis/keys.py`).

One entry per answer; feedback on the same answer replaces it. The newest `KEPT_FEEDBACK` entries are kept; those of a
person without a profile expire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

import orjson

from server.errors import UserErased
from server.store.base import Store, corrupt_if_undecodable, decode
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.samples import Sample, decode_sample, encode_sample

KEPT_FEEDBACK = 1000  # entries per user
NO_PROFILE_S = 21 * 24 * 3600  # how long feedback of a person without a profile stays, from their last one on

_PUT = script("feedback/put")


class Outcome(StrEnum):
    """What the person did with an answer."""

    SENT = "sent"
    EDITED = "edited"
    DISCARDED = "discarded"


class Rating(StrEnum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Feedback:
    """What is kept about one answer, besides the text that the person sent instead."""

    level: str  # of the answer, as `arm`
    arm: str
    outcome: Outcome | None = None
    rating: Rating | None = None
    changed: float | None = None  # share of the answer that the person changed, 0 to 1; None if unknown

    def over(self, before: Feedback | None) -> Feedback:
        """Return this feedback, with what it leaves open taken from an earlier one on the same answer."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.outcome:
            given["changed"] = self.changed
        return replace(before, **given) if before else self


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored feedback."""

    at_ms: int  # time of the text, or of the first feedback on the answer, by the store's clock
    feedback: Feedback
    sample: Sample | None = None  # what the person sent instead, and to what


class FeedbackStore(Store):
    """Stores feedback by user key."""

    async def add(
        self, user_key: str, answer: str, feedback: Feedback, sample: Sample | None, epoch: str
    ) -> tuple[Feedback, Feedback | None]:
        """Add to the feedback on an answer; without a sample, an earlier sample stays.

        Returns what is known now and what was known before; if the store's reply was lost, both are alike, and the
        change is counted nowhere. Raises `UserErased` if the user was erased since `epoch`.
        """
        names = (keys.feedback(user_key), keys.learned(user_key), keys.epoch(user_key), keys.profile(user_key))
        said = encode_sample(sample) if sample else b""
        while True:
            seen = await self._connection.run(lambda redis: redis.hget(names[0], answer)) or b""
            before = _entry(seen).feedback if seen else None
            new = feedback.over(before)
            raw = orjson.dumps(asdict(new))
            written = await self._connection.write(
                _PUT, names, epoch, answer, seen, raw, said, KEPT_FEEDBACK, NO_PROFILE_S
            )
            if written < 0:
                raise UserErased
            if written:
                return new, before

    async def entries(self, user_key: str) -> Mapping[str, Entry]:
        """Return all kept feedback of a user by answer, oldest first."""
        raw = await self._hash(keys.feedback(user_key))
        samples = await self._hash(keys.learned(user_key))
        entries = {answer.decode(): _entry(entry, samples.get(answer)) for answer, entry in raw.items()}
        return dict(sorted(entries.items(), key=lambda pair: (pair[1].at_ms, pair[0])))

    async def learned_ms(self, user_key: str) -> list[int]:
        """Return the times of the entries that have a sample, without reading the samples."""
        answers = set(await self._connection.run(lambda redis: redis.hkeys(keys.learned(user_key))))
        raw = await self._hash(keys.feedback(user_key))
        return [_entry(entry).at_ms for answer, entry in raw.items() if answer in answers]

    async def _hash(self, name: str) -> Mapping[bytes, bytes]:
        raw: Mapping[bytes, bytes] = await self._connection.run(lambda redis: redis.hgetall(name), WRITE_TIMEOUT_S)
        return raw


def _entry(raw: bytes, sample: bytes | None = None) -> Entry:
    at_ms, _, text = raw.partition(b" ")
    with corrupt_if_undecodable():
        return Entry(int(at_ms), decode(Feedback, text), decode_sample(sample) if sample else None)
