"""People who send requests and writes from several threads, and the acknowledgements they got."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.fleet.exercise.asking import End, Outcome, ask, stream
from bench.rig.people import write_people
from bench.rig.processes import mta
from bench.rig.tiny import WORLDS, world

TIMEOUT_S = 90.0
"""Request timeout, longer than every pause: nothing is sent again while the first request may still be processed."""

RETRY_DELAY_S = 0.3
PAUSE_S = 0.1
"""Seconds between two turns of a crowd."""
IMPORTED, IMPORT_PAUSE_S = 12, 20.0

TURNS = {"generate": 25, "stream": 25, "openai": 10, "openai stream": 10, "write": 18, "adapt": 4, "erase": 3}


@dataclass(slots=True)
class Person:
    """The acknowledged state of one person.

    Attributes:
        id: the user id.
        texts: texts of all items acknowledged since the last erasure; None if erased.
        erased: texts that must not appear again.
        jobs: jobs accepted since the last erasure.
    """

    id: str
    texts: list[str] | None = None
    erased: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)


class Crowd(threading.Thread):
    """Some people who act in turn until `stop`.

    Writes are repeated until they are acknowledged, as an app would do, so that the expected state is known.

    Args:
        url: the gateway's URL.
        name: the crowd's name.
        size: number of people.
        seed: seed of their actions.
        headers: headers of every request, for example with an API key.
        pause_s: seconds between two turns.
    """

    def __init__(
        self,
        url: str,
        name: str,
        size: int,
        seed: str,
        headers: Mapping[str, str] | None = None,
        *,
        pause_s: float = PAUSE_S,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.people = [Person(f"{name}-{number}") for number in range(size)]
        self.asked: list[Outcome] = []
        self.failure: BaseException | None = None
        self._url = url
        self._headers = headers
        self._pause_s = pause_s
        self._chance = random.Random(seed)
        self._count = 0
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Stop after the current turn, which may have to wait for the fleet."""
        self._stop_asked.set()

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self._url, headers=self._headers, timeout=TIMEOUT_S) as client:
                while not self._stop_asked.wait(self._pause_s):
                    self._turn(client)
        except BaseException as failure:
            self.failure = failure
            raise

    def _turn(self, client: httpx.Client) -> None:
        person = self._chance.choice(self.people)
        if person.texts is None:
            self._write(client, person)
            return
        (turn,) = self._chance.choices(list(TURNS), list(TURNS.values()))
        if turn == "write":
            self._write(client, person)
        elif turn == "adapt":
            self._adapt(client, person)
        elif turn == "erase":
            self._until_done(client, "DELETE", f"/users/{person.id}", gone_is_done=True)
            person.erased += person.texts
            person.texts, person.jobs = None, []
        else:
            self._generate(client, person, turn)

    def _generate(self, client: httpx.Client, person: Person, turn: str) -> None:
        prompt = f"{self._chance.choice(WORLDS)}? {self._chance.random()}"
        tokens = self._chance.choice((4, 8, 24))
        streamed = {"stream": True} if "stream" in turn else {}
        who: dict[str, object] = {"user_id": person.id, "prompt": prompt}
        path, headers = "/generate", {}
        if turn.startswith("openai"):
            who = {"model": "mta", "messages": [{"role": "user", "content": prompt}]}
            path, headers = "/v1/chat/completions", {"X-User-ID": person.id}
        body = {**who, "max_tokens": tokens, **streamed}
        self.asked.append(
            stream(client, path, body, headers) if streamed else ask(client, "POST", path, body, headers)[0]
        )

    def _write(self, client: httpx.Client, person: Person) -> None:
        """Replace the history of a new person, and sometimes of others; otherwise append to it."""
        self._count += 1
        text = f"{self._chance.choice(WORLDS)}, as {person.id} said for the {self._count}th time"
        path, items = f"/users/{person.id}/profile", [{"id": f"i{self._count}", "text": text}]
        if person.texts is None or self._chance.random() < 0.1:
            self._until_done(client, "PUT", path, {"items": items})
            person.erased += person.texts or []
            person.texts = [text]
        else:
            self._until_done(client, "POST", f"{path}/items", {"items": items})
            person.texts.append(text)

    def _adapt(self, client: httpx.Client, person: Person) -> None:
        samples = [{"input": f"What about {world}?", "output": f"{world}, {person.id}!"} for world in WORLDS[:4]]
        answer = self._until_done(client, "POST", f"/users/{person.id}/adapt", {"samples": samples})
        person.jobs.append(answer["id"])

    def _until_done(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        body: object = None,
        *,
        gone_is_done: bool = False,
    ) -> dict[str, str]:
        """Repeat a write until it is acknowledged; `gone_is_done` accepts a 404 as an erasure already done."""
        while True:
            asked, answer = ask(client, method, path, body)
            self.asked.append(asked)
            done: dict[str, str] = answer or {}
            if asked.end is End.ANSWERED or (gone_is_done and asked.reason == "not_found"):
                return done
            assert asked.end is not End.REFUSED or not answer or answer["error"]["type"] == "service_unavailable", asked
            time.sleep(RETRY_DELAY_S)


def ended(crowds: Sequence[Crowd]) -> tuple[list[Outcome], list[Person]]:
    """Stop crowds, and return what they asked and their people; raise what failed in one of them."""
    for crowd in crowds:
        crowd.stop()
    for crowd in crowds:
        crowd.join(2 * TIMEOUT_S)
        assert not crowd.is_alive(), f"{crowd.name} hangs"
        if crowd.failure:
            raise crowd.failure
    people = [person for crowd in crowds for person in crowd.people]
    return [one for crowd in crowds for one in crowd.asked], people


class Imports(threading.Thread):
    """Imports files of people one after the other with `mta users import`."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(name="imports", daemon=True)
        self.people: list[Person] = []
        self.failures: list[str] = []
        self._url, self._folder = url, folder
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Stop after the current file."""
        self._stop_asked.set()

    def run(self) -> None:
        number = 0
        while not self._stop_asked.is_set():
            number += 1
            people = [Person(f"imported-{number}-{i}", [f"{world(i)}, by {number}-{i}"]) for i in range(IMPORTED)]
            everybody = [{"user_id": person.id, "profile": person.texts} for person in people]
            file = write_people(self._folder / f"people-{number}.json", everybody)
            command = mta("users", "import", str(file), "--url", self._url)
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                self.failures.append(ran.stdout + ran.stderr)
            self.people += people
            self._stop_asked.wait(IMPORT_PAUSE_S)
