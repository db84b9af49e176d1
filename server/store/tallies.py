"""What personalisation is worth: tallies of each person and week, and their sums by tenant (keys: `redis/keys.py`).

Writes do not wait for the disk: a crash forgets the tallies of the last seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add, attrgetter, methodcaller, sub
from typing import Self

from server.store.base import Store, corrupt_if_undecodable, pairs
from server.store.feedback import Feedback, Outcome, Rating
from server.store.redis import keys
from server.store.redis.scripts import script

TALLY_S = 21 * 24 * 3600  # a week is folded within its next one
EVER = 0  # the week under which the sums of all weeks are kept

_ADD_TO_TALLY = script("tallies/add")
_ADD_TO_SUMS = script("tallies/add", runs_when_full=True)  # else a full store would lose the tallies that were taken

_TAKE = script("tallies/take")


@dataclass(frozen=True, slots=True)
class Cell:
    """What counts are about; `level` is the one that the arm `full` speaks."""

    week: int
    share: int  # of people held out, per 10,000; 0 in a person's tally, whose counts contain it
    level: str
    arm: str

    @property
    def field(self) -> str:
        return f"{self.week}.{self.share}.{self.level}.{self.arm}"

    @classmethod
    def of(cls, field: str) -> Self:
        week, share, level, arm = field.split(".")
        return cls(int(week), int(share), level, arm)


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of answers, by what people did with them."""

    answers: float = 0
    shares: float = 0  # sum over answers of the share of people held out, per 10,000
    shares_squared: float = 0  # sum of its square
    answered: float = 0  # with feedback
    sent: float = 0
    edited: float = 0
    discarded: float = 0
    up: float = 0
    down: float = 0
    measured: float = 0  # with a known share of changed text
    changed: float = 0  # sum of these shares

    @classmethod
    def of(cls, feedback: Feedback | None) -> Counts:
        if feedback is None:
            return cls()
        return cls(
            answered=1,
            sent=feedback.outcome is Outcome.SENT,
            edited=feedback.outcome is Outcome.EDITED,
            discarded=feedback.outcome is Outcome.DISCARDED,
            up=feedback.rating is Rating.UP,
            down=feedback.rating is Rating.DOWN,
            measured=feedback.changed is not None or feedback.outcome is Outcome.SENT,
            changed=feedback.changed or 0,
        )

    @property
    def share(self) -> int | None:
        """Return the share of people held out, per 10,000; None if it is not the same for all answers, or for none."""
        same = self.answers > 0 and self.shares**2 == self.answers * self.shares_squared
        return round(self.shares / self.answers) if same else None

    @property
    def numbers(self) -> tuple[float, ...]:
        numbers: tuple[float, ...] = _NUMBERS(self)  # `astuple` copies deeply and takes 30 times as long
        return numbers

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, self.numbers, other.numbers))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*map(sub, self.numbers, other.numbers))


_NUMBERS = attrgetter(*Counts.__slots__)


class TallyStore(Store):
    """Stores tallies and their sums."""

    async def add(self, user_key: str, epoch: str, counts: Mapping[Cell, Counts]) -> bool:
        """Add to a person's tally; return False, and add nothing, if the user was erased since `epoch`."""
        names = (keys.tally(user_key), keys.epoch(user_key))
        fields = _encoded({cell: counts[cell].numbers for cell in counts})
        return bool(await self._connection.evaluate(_ADD_TO_TALLY, names, epoch, TALLY_S, "", *fields))

    async def tally(self, user_key: str) -> Mapping[Cell, Counts]:
        raw = await self._connection.run(lambda redis: redis.hgetall(keys.tally(user_key)))
        return {cell: Counts(*numbers) for cell, numbers in _decoded(raw).items()}

    async def take(self, user_key: str, week: int) -> Mapping[Cell, Counts]:
        """Remove a person's tally of a week and return it: of several callers, one gets it."""
        raw = await self._connection.evaluate(_TAKE, (keys.tally(user_key),), week)
        return {cell: Counts(*numbers) for cell, numbers in _decoded(pairs(raw)).items()}

    async def add_people(self, week: int, tenant: str, user_keys: Iterable[str]) -> None:
        """Note people who have a tally of a week."""
        await self._connection.run(methodcaller("sadd", keys.WORTH, f"{week} {tenant}"))
        name = keys.people(week, tenant)
        await self._connection.run(methodcaller("sadd", name, *user_keys))
        await self._connection.run(methodcaller("expire", name, TALLY_S))

    async def remove_erased(self, user_key: str, tenant: str) -> None:
        for week in await self.weeks(tenant):
            await self._connection.run(methodcaller("srem", keys.people(week, tenant), user_key))

    async def move(self, user_key: str, to: str, tenant: str) -> None:
        """Note a person under another key, to which their tally has moved, unless they are erased meanwhile."""
        for week in await self.weeks(tenant):
            if await self._connection.run(methodcaller("srem", keys.people(week, tenant), user_key)):
                await self.add_people(week, tenant, [to])
                if not await self._connection.run(methodcaller("exists", keys.tally(to))):
                    await self.remove_erased(to, tenant)

    async def all_weeks(self) -> list[tuple[int, str]]:
        """Return the weeks, each with a tenant, that have people whose tallies are not folded yet."""
        members = await self._connection.run(methodcaller("smembers", keys.WORTH))
        named = (member.decode().partition(" ") for member in members)
        return sorted((int(week), tenant) for week, _, tenant in named)

    async def weeks(self, tenant: str) -> list[int]:
        return [week for week, name in await self.all_weeks() if name == tenant]

    async def people(self, week: int, tenant: str) -> int:
        """Return the number of people with a tally of a week that is not folded yet."""
        return int(await self._connection.run(methodcaller("scard", keys.people(week, tenant))))

    async def pop_people(self, week: int, tenant: str, count: int) -> list[str]:
        """Remove some people of a week and return them; of several callers, each gets others."""
        popped = await self._connection.run(methodcaller("spop", keys.people(week, tenant), count))
        return [user_key.decode() for user_key in popped]

    async def end_week(self, week: int, tenant: str) -> None:
        """Note that all tallies of a week are folded."""
        await self._connection.run(methodcaller("srem", keys.WORTH, f"{week} {tenant}"))

    async def add_sums(self, tenant: str, token: str, sums: Mapping[Cell, Sequence[float]]) -> None:
        """Add to the sums of a tenant; `token` is unique to this call."""
        await self._connection.evaluate(_ADD_TO_SUMS, (keys.folded(tenant),), "", 0, token, *_encoded(sums))

    async def sums(self, tenant: str) -> Mapping[Cell, Sequence[float]]:
        raw = await self._connection.run(methodcaller("hgetall", keys.folded(tenant)))
        raw.pop(b"token", None)
        return _decoded(raw)

    async def drop_sums(self, tenant: str, cells: Sequence[Cell]) -> None:
        if cells:
            fields = [cell.field for cell in cells]
            await self._connection.run(methodcaller("hdel", keys.folded(tenant), *fields))


def _encoded(sums: Mapping[Cell, Sequence[float]]) -> Iterator[str]:
    for cell, numbers in sums.items():
        yield from (cell.field, " ".join(f"{number:.17g}" for number in numbers))


def _decoded(raw: Mapping[bytes, bytes]) -> dict[Cell, tuple[float, ...]]:
    with corrupt_if_undecodable():
        return {Cell.of(field.decode()): tuple(map(float, numbers.split())) for field, numbers in raw.items()}
