"""The claims and their findings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx

from bench.fleet.exercise import census
from bench.fleet.exercise.asking import End, Outcome
from bench.fleet.exercise.crowds import Person
from bench.fleet.exercise.faults import Outage
from bench.page.report import marked

MAX_FAILED_SHARE = 0.01
"""Maximum share of requests that fail before their first token while one of two engines is down."""

GENERATING = {"POST /generate", "POST /v1/chat/completions"}
MAX_RECOVERY_S = 60.0
JOBS_END_S = 240.0
TOMBSTONE = "epoch"
SHARED = "mta:"
SHARED_KINDS = 13
"""Beginning of the keys without a user (queues, log rewriting, API keys and adaptation), and their maximum number."""

ENDED = frozenset(("succeeded", "rejected", "failed", "cancelled", "superseded"))


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, its finding, and whether it holds."""

    what: str
    found: str
    holds: bool

    @property
    def row(self) -> tuple[str, str]:
        """The claim's row in a report."""
        return self.what, marked(self.found, self.holds)


def about_load(
    client: httpx.Client, asked: Sequence[Outcome], people: Sequence[Person], outages: Sequence[Outage]
) -> list[Claim]:
    """Check how requests ended, and that what was acknowledged to people is kept."""
    return [*about_requests(asked, outages), *about_promises(client, people), about_jobs(client, people)]


def about_requests(asked: Sequence[Outcome], outages: Sequence[Outage]) -> list[Claim]:
    """Check how requests ended, and how many failed while one of two engines was down."""
    ends = Counter(one.end for one in asked)
    unclear = Counter(one.reason for one in asked if one.end is End.UNCLEAR)
    away = [outage for outage in outages if outage.fault.kind == "gateway"]
    cut = [one for one in asked if one.end is End.CUT]
    unexplained = Counter(
        one.reason for one in cut if not any(outage.during(one.begun_s, one.ended_s) for outage in away)
    )
    engines = [outage for outage in outages if outage.fault.kind == "engine"]
    beside = [one for one in asked if any(outage.during(one.begun_s, one.ended_s) for outage in engines)]
    generating = [one for one in beside if one.what.removesuffix(", streamed") in GENERATING]
    waiting = [one for one in generating if not one.streaming or one.end is End.ANSWERED]
    failed = Counter(one.reason for one in waiting if one.end is not End.ANSWERED and one.reason != "not_found")
    fraction = failed.total() / len(waiting) if waiting else 0.0
    clear = ", ".join(f"{ends[end]:,} {end}" for end in (End.REFUSED, End.BROKEN, End.CUT))
    return [
        Claim("requests", f"{len(asked):,}: {ends[End.ANSWERED]:,} answered, {clear}", bool(asked)),
        Claim(f"requests with {End.UNCLEAR}", _counted(unclear), not unclear),
        Claim(
            "connections lost while no gateway was down",
            _counted(unexplained),
            not unexplained,
        ),
        Claim(
            "failed before their first token while one of two engines was down",
            f"{_counted(failed)} of {len(waiting):,}, {fraction:.2%}",
            bool(waiting) and fraction < MAX_FAILED_SHARE,
        ),
    ]


def about_outages(outages: Sequence[Outage]) -> list[Claim]:
    """Check the time that parts took to recover."""
    claims = []
    for kind in sorted({outage.fault.kind for outage in outages}):
        of_kind = [outage for outage in outages if outage.fault.kind == kind]
        kills = [outage.recovery_s for outage in of_kind if not outage.fault.pause_s]
        pauses = [outage.recovery_s for outage in of_kind if outage.fault.pause_s]
        said = [f"{len(kills)} kills, whole again after {max(kills):.1f} s at most"] if kills else []
        said += [f"{len(pauses)} pause, after {max(pauses):.1f} s"] if pauses else []
        claims.append(Claim(kind, "; ".join(said), max([*kills, *pauses]) <= MAX_RECOVERY_S))
    return claims


def about_promises(client: httpx.Client, people: Iterable[Person]) -> list[Claim]:
    """Check that all acknowledged data is there, and nothing that was erased or replaced."""
    missing, back, kept, gone = [], [], 0, 0
    for person in people:
        answer = client.get(f"/users/{person.id}/export")
        text = answer.text if answer.is_success else ""
        kept += len(person.texts or ())
        gone += len(person.erased)
        missing += [said for said in person.texts or () if said not in text]
        back += [said for said in person.erased if f'"{said}"' in text]
        if person.texts is None and answer.status_code != httpx.codes.NOT_FOUND:
            back.append(f"{person.id}: HTTP {answer.status_code}")
    return [
        Claim("acknowledged writes that are missing", f"{len(missing)} of {kept:,}", not missing),
        Claim("erased or replaced, and there again", f"{len(back)} of {gone:,}", not back),
    ]


def about_jobs(client: httpx.Client, people: Iterable[Person]) -> Claim:
    """Check that every accepted job ended."""
    open_jobs = {job for person in people for job in person.jobs}
    accepted, states, deadline_s = len(open_jobs), Counter[str](), time.monotonic() + JOBS_END_S
    while open_jobs and time.monotonic() < deadline_s:
        for job in sorted(open_jobs):
            state = client.get(f"/jobs/{job}").raise_for_status().json()["state"]
            if state in ENDED:
                states[state] += 1
                open_jobs.remove(job)
        time.sleep(0.5 if open_jobs else 0)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    holds = not open_jobs and not states["failed"]
    return Claim("accepted jobs that did not end", f"{len(open_jobs)} of {accepted} ({ended})", holds)


def about_growth(before: dict[str, census.Usage], after: dict[str, census.Usage]) -> list[Claim]:
    """Compare what each part uses with what it used before."""
    return [
        Claim(
            f"{name}: memory, descriptors",
            f"{then.memory_mib:.0f} to {after[name].memory_mib:.0f} MiB, "
            f"{then.descriptors} to {after[name].descriptors}",
            not then.exceeded_by(after[name]),
        )
        for name, then in before.items()
    ]


def after_erasing(
    client: httpx.Client, people: Sequence[Person], store_url: str, before: Counter[str], *, moved: int = 0
) -> list[Claim]:
    """Erase all people, and check the keys that have come since `before`; `moved` people left a mark at an old key."""
    for person in people:
        with suppress(httpx.HTTPStatusError):  # erased before
            client.delete(f"/users/{person.id}").raise_for_status()
    return about_keys(census.kinds_of_keys(store_url) - before, len(people) + moved)


def about_keys(kinds: Counter[str], users: int) -> list[Claim]:
    """Check the keys that remain after all people are erased: tombstones, and keys without a user."""
    tombstones = kinds[TOMBSTONE]
    others = {kind: count for kind, count in kinds.items() if kind != TOMBSTONE}
    return [
        Claim("tombstones, once everybody is erased", f"{tombstones} of {users} people", tombstones <= users),
        Claim(
            "other keys, once everybody is erased",
            f"{sum(others.values())} {dict(sorted(others.items()))}",
            all(kind.startswith(SHARED) for kind in others) and sum(others.values()) <= SHARED_KINDS,
        ),
    ]


def _counted(reasons: Counter[str]) -> str:
    """Format the total and the most common reasons."""
    common = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    return f"{reasons.total()}{f' ({common})' if common else ''}"
