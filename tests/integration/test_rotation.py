"""MTA_SECRET is exchanged under load: by two gateways, by `mta secret rotate`, which is killed once, with erasures."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import redis
from pydantic import SecretStr

from adapters.errors import MtaError
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.observability.audit import audit_to
from server.settings import Settings
from server.store.redis import keys
from server.store.tenants.user_key import UserKeys
from tests.support.calls import mta
from tests.support.gateway import SECRET, generate, serving

NEW = "the secret that comes after it"
BOTH = f"{NEW},{SECRET}"
SAMPLES = {"samples": [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(4)]}
PEOPLE = 42


def with_secret(settings: Settings, store: ValkeyProcess, secret: str) -> AbstractContextManager[httpx.Client]:
    return serving(settings, redis_url=store.url, secret=SecretStr(secret))


@dataclass
class Person:
    """Somebody whose requests follow one another, so that it is known what is stored."""

    id: str
    items: set[str] = field(default_factory=set)
    rated: set[str] = field(default_factory=set)  # answers
    answers: list[str] = field(default_factory=list)  # from before the exchange
    job: str = ""

    def live(self, client: httpx.Client, lot: random.Random, numbers: Iterator[int]) -> None:
        """Send some requests, none of which may meet somebody unknown or fail."""
        path = f"/users/{self.id}"
        if self.items and lot.random() < 0.15:
            client.delete(path).raise_for_status()
            assert client.get(path).status_code == httpx.codes.NOT_FOUND
            assert self.answer(client)["personalization"]["level"] == "base"
            self.items, self.rated, self.answers, self.job = set(), set(), [], ""
        name = f"i{next(numbers)}"
        client.post(
            f"{path}/profile/items", json={"items": [{"id": name, "input": "What is new?", "output": f"about {name}"}]}
        ).raise_for_status()
        self.items.add(name)
        assert client.get(path).raise_for_status().json()["items"] == len(self.items)
        answer = self.answer(client)
        assert answer["personalization"]["level"] != "base"
        assert answer["personalization"]["history"] == 1, answer
        if lot.random() < 0.5:
            self.rate(client, self.answers.pop() if self.answers else answer["id"])
        if self.job:
            assert client.get(f"/jobs/{self.job}").raise_for_status().json()["state"] in ("queued", "cancelled")
            if lot.random() < 0.3:
                client.delete(f"/jobs/{self.job}")
                assert client.get(f"/jobs/{self.job}").raise_for_status().json()["state"] == "cancelled"

    def answer(self, client: httpx.Client) -> dict:
        return generate(client, self.id, history=1).raise_for_status().json()

    def rate(self, client: httpx.Client, answer: str) -> None:
        body = {"answer": answer, "rating": "up"}
        client.post(f"/users/{self.id}/feedback", json=body).raise_for_status()
        self.rated.add(answer.rpartition(".")[0])


class Load:
    """Requests of all people over several gateways, until told to stop."""

    def __init__(self, clients: list[httpx.Client], people: list[Person]) -> None:
        self._clients, self._enough = clients, threading.Event()
        self._numbers, self._rounds = itertools.count(), defaultdict[int, int](int)
        self._threads = ThreadPoolExecutor(3)
        shares = [people[place::3] for place in range(3)]
        self._running: list[Future[None]] = [self._threads.submit(self._live, share) for share in shares]

    def round(self) -> None:
        """Wait until everybody has sent requests once more from now on."""
        before = dict(self._rounds)
        wait_until(lambda: self._failed() or all(self._rounds[n] >= before.get(n, 0) + 2 for n in range(3)), "rounds")

    def stop(self) -> None:
        self._enough.set()
        for running in self._running:
            running.result(60)

    def _failed(self) -> bool:
        return any(running.done() for running in self._running)

    def _live(self, people: list[Person]) -> None:
        lot, place = random.Random(people[0].id), int(people[0].id.rpartition("-")[2]) % 3
        while not self._enough.is_set():
            for person in people:
                person.live(lot.choice(self._clients), lot, self._numbers)
            self._rounds[place] += 1


def items_of(client: httpx.Client, user: str) -> set[str]:
    answer = client.get(f"/users/{user}/export")
    return {item["id"] for item in answer.json()["items"]} if answer.status_code == httpx.codes.OK else set()


@pytest.fixture
def log(log: Path, store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The audit log from the first command on; commands have both secrets, and the store is empty at first."""
    audit_to(None)
    monkeypatch.setenv("MTA_REDIS_URL", store.url)
    monkeypatch.setenv("MTA_SECRET", BOTH)
    with redis.from_url(store.url) as raw:
        raw.flushall()
    return log


@pytest.mark.usefixtures("fake_engine")
def test_nobody_is_lost_unknown_back_or_twice(gateway_settings: Settings, store: ValkeyProcess, log: Path) -> None:
    people = [Person(f"person-{number}") for number in range(PEOPLE)]
    lot, numbers = random.Random(1), itertools.count()
    with with_secret(gateway_settings, store, SECRET) as client:
        for person in people:
            person.live(client, lot, numbers)
            person.answers = [person.answer(client)["id"]]
            if lot.random() < 0.3:
                asked = client.post(f"/users/{person.id}/adapt", json=SAMPLES).raise_for_status().json()
                person.job = asked["id"]
                person.items |= items_of(client, person.id)

    with ExitStack() as stack, redis.from_url(store.url) as raw:
        clients = [stack.enter_context(with_secret(gateway_settings, store, BOTH)) for _ in range(2)]
        load = Load(clients, people)
        load.round()
        killed = subprocess.Popen([sys.executable, "-m", "server.cli", "secret", "rotate"], env=os.environ)
        wait_until(lambda: log.exists() and "begun" in log.read_text(), "the exchange to begin")
        killed.kill()
        killed.wait()
        load.round()
        assert "take OLD away" in mta("secret", "rotate")
        load.round()
        load.stop()
        former = UserKeys(SECRET, gateway_settings.tenant)
        former_keys = [former.key(person.id) for person in people]
        for key in former_keys:  # under the old key there is what requests in progress may read, for a while
            left = {name.decode() for name in raw.scan_iter(f"*{key}*")}
            assert left <= {keys.epoch(key), keys.items(key), keys.adapter(key)}
            assert -1 not in {raw.ttl(name) for name in left}, left

    with with_secret(gateway_settings, store, NEW) as client:
        for person in people:
            export = client.get(f"/users/{person.id}/export").raise_for_status().json()
            assert {item["id"] for item in export["items"]} == person.items
            assert {entry["answer"] for entry in export["feedback"]} == person.rated
            if person.job:
                assert client.get(f"/jobs/{person.job}").raise_for_status().json()["id"] == export["jobs"][-1]["id"]
    with pytest.raises(MtaError, match="another than the one"):
        with_secret(gateway_settings, store, SECRET).__enter__()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["outcome"] for entry in entries if entry["act"] == "secret_exchanged"] == ["begun", "begun", "done"]
    assert not any(word in log.read_text() for word in (SECRET, NEW, "person-", *former_keys))


@pytest.mark.usefixtures("fake_engine")
def test_copy_before_the_exchange_restores_no_erased_user(
    gateway_settings: Settings, store: ValkeyProcess, log: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = log.parent / "copies"
    for constant in ("server.cli.secret.SETTLE_S", "server.store.backup.copying.SETTLE_S"):
        monkeypatch.setattr(constant, 0)
    people = ["kept", "erased", "kept-too", "erased-too"]
    with with_secret(gateway_settings, store, SECRET) as client:
        for user in people:
            Person(user).live(client, random.Random(1), itertools.count())
    mta("backup", "--out", copies)
    assert "4 users moved" in mta("secret", "rotate")
    with with_secret(gateway_settings, store, NEW) as client:
        for user in ("erased", "erased-too"):
            client.delete(f"/users/{user}").raise_for_status()

    (copy,) = copies.iterdir()
    with ValkeyProcess(memory / "restored") as empty:
        monkeypatch.setenv("MTA_REDIS_URL", empty.url)
        monkeypatch.setenv("MTA_SECRET", SECRET)
        with pytest.raises(MtaError, match="exchanged since the copy: set `NEW,OLD`"):
            mta("restore", copy, "--erased", log)
        monkeypatch.setenv("MTA_SECRET", BOTH)
        assert "restored: 2 users" in mta("restore", copy, "--erased", log)
        with with_secret(gateway_settings, empty, BOTH) as client:
            found = [bool(items_of(client, user)) for user in people]
    assert found == [True, False, True, False]
