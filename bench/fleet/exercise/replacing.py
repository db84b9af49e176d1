"""Replace the parts of a fleet one after the other under load; no request may fail."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import httpx

from bench.fleet.exercise.claims import Claim
from bench.fleet.exercise.parts import ReplaceableParts, Replacement, RotatedParts
from bench.page.report import console
from bench.rig.tiny import WORLDS
from mta_client import Client
from server.store.rotation import GRACE_MS

CLIENTS, PEOPLE, TOKENS = 3, 8, 48
PAUSE_S = 0.1
ANSWER_S = 60.0
CALM_S = 3.0
"""Seconds between two replacements: gateways check engines every two seconds, routers every second."""


class Load(threading.Thread):
    """A client that sends one request after the other to any gateway that accepts the connection.

    Attributes:
        closed_url: URL of a gateway that gets no new requests, as a load balancer would have it; empty if all do.
    """

    def __init__(self, urls: Sequence[str], seed: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(daemon=True)
        self.failures: list[str] = []
        self.recipes: Counter[str] = Counter()
        self.closed_url = ""
        # A connection that is kept and that the gateway has closed would look like a lost request.
        fresh = httpx.Limits(max_keepalive_connections=0)
        self._clients = {
            url: httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S, limits=fresh) for url in urls
        }
        self._chance = random.Random(seed)
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Stop after the current request; a request that does not end counts as failed."""
        self._stop_asked.set()
        self.join(ANSWER_S)
        if self.is_alive():
            self.failures.append(f"an answer did not end within {ANSWER_S:.0f} s")

    def run(self) -> None:
        while not self._stop_asked.wait(PAUSE_S):
            user = person(self._chance.randrange(PEOPLE))
            body = {"user_id": user, "prompt": self._chance.choice(WORLDS), "max_tokens": TOKENS, "history": 0}
            if self._chance.random() < 0.2:
                self._one("PUT", f"/users/{user}/profile", {"items": [{"text": self._chance.choice(WORLDS)}]})
            elif answer := self._one("POST", "/generate", body | {"stream": self._chance.random() < 0.5}):
                self.recipes[recipe_in(answer)[:13]] += 1

    def _one(self, method: str, path: str, body: dict[str, object]) -> str | None:
        asked = [url for url in self._clients if url != self.closed_url]
        for url in self._chance.sample(asked, len(asked)):
            try:
                response = self._clients[url].request(method, path, json=body)
            except Exception as error:  # any failure of a request; this thread must continue
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    continue
                self.failures.append(f"{method} {path}: {error!r}")
                return None
            if response.is_success and (not body.get("stream") or response.text.rstrip().endswith("data: [DONE]")):
                return response.text
            self.failures.append(f"{method} {path}: {response.status_code} {response.text[-200:]}")
            return None
        self.failures.append(f"{method} {path}: no gateway took the connection")
        return None


def person(number: int) -> str:
    """Return the user id of one of `PEOPLE`."""
    return f"rolled-{number}"


def recipe_in(answer: str) -> str:
    """Return the recipe of an answer, given as JSON or as its stream."""
    return answer.partition('"recipe":"')[2].partition('"')[0]


def know_people(parts: ReplaceableParts) -> None:
    """Give everybody of a load a profile."""
    key = parts.headers.get("Authorization", "").removeprefix("Bearer ")
    with Client(parts.urls[0], key=key or None) as client:
        for number in range(PEOPLE):
            client.put_profile(person(number), WORLDS[:1])


def replace_all(parts: ReplaceableParts) -> list[Claim]:
    """Replace every part under load, and return what was found."""
    loads = [Load(parts.urls, seed, parts.headers) for seed in range(CLIENTS)]
    for load in loads:
        load.start()
    replaced = 0
    time.sleep(CALM_S)
    for step in parts.replacements():
        _close(loads, step.closed_url)
        step.replace()
        _close(loads, "")
        time.sleep(CALM_S)
        replaced += 1
        console().print(f"exchanged: {step}; {sum(len(load.failures) for load in loads)} requests failed so far")
    for load in loads:
        load.stop()
    failures = [failure for load in loads for failure in load.failures]
    recipes = sum((load.recipes for load in loads), Counter[str]())
    impersonal = recipes.pop("", 0)
    by_bank = ", ".join(f"{name}: {count:,}" for name, count in recipes.items())
    return [
        Claim("parts exchanged under load", f"{replaced}", replaced > 0),
        Claim("answers", f"{recipes.total():,}", recipes.total() > 0),
        Claim("answers by bank", by_bank, True),
        Claim("answers by the base model", f"{impersonal}", not impersonal),
        Claim("requests that failed", f"{len(failures)} {failures[:3] or ''}".strip(), not failures),
    ]


def _close(loads: Sequence[Load], url: str) -> None:
    """Let a load balancer send nothing to a gateway; to all if the URL is empty."""
    for load in loads:
        load.closed_url = url


def exchange_secret(
    parts: RotatedParts, new: str, do: Callable[[Replacement], object] = lambda step: step.replace()
) -> str:
    """Exchange MTA_SECRET, as docs/security.md says, each step by `do`; return what `mta secret rotate` printed."""
    old = parts.secret
    for step in parts.with_secret(f"{new},{old}"):
        do(step)
    said = parts.command("secret", "rotate")
    time.sleep(GRACE_MS / 1000)
    for step in parts.with_secret(new):
        do(step)
    return said
