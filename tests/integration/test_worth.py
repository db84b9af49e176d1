"""What personalisation is worth: from answers and feedback to `GET /worth` and `mta worth`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import mta_client
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.cli import app
from server.gateway.experiments.arms import Arm, arm_of
from server.settings import Settings
from server.store.tenants.access_keys import Policy, Scope, access_key, new_secret
from server.store.tenants.rates import NO_OVERRIDES
from server.store.tenants.user_key import UserKeys
from tests.support.calls import FINAL, ITEMS, NewUser, error_of, give, put
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, GatewayThread, Keyed, chunks_of, generate, make_keys
from tests.support.store_parts import StoreParts

HOLDOUT = 0.5
WEEK_S = 7 * 24 * 3600
TENANTS = ("acme", "fresh", "feedback", "fallback", "off")


@pytest.fixture(scope="module")
def keyed(gateway_settings: Settings, store: ValkeyProcess) -> Iterator[Keyed]:
    """A gateway that holds out half of all users, none of the tenant `off`; it stores and folds all the time."""
    scopes = {name: (name, tuple(Scope), NO_OVERRIDES) for name in TENANTS[:-1]}
    secrets = make_keys(store.url, scopes | {"app": ("acme", (Scope.GENERATE, Scope.WRITE), NO_OVERRIDES)})
    secrets["off"] = new_secret()

    async def add_off() -> None:
        async with StoreParts.opened(store.url) as parts:
            await parts.keys.add(access_key(secrets["off"], "off", "off", Scope, Policy(holdout=0.0)))

    asyncio.run(add_off())
    with pytest.MonkeyPatch.context() as patched:
        for constant in ("STORE_INTERVAL_S", "FOLD_INTERVAL_S"):
            patched.setattr(f"server.gateway.opening.{constant}", 0.05)
        with GatewayThread(gateway_settings, redis_url=store.url, holdout=HOLDOUT) as gateway:
            yield Keyed(gateway, secrets)


@pytest.fixture
def clients(keyed: Keyed, fake_engine: FakeEngine) -> Iterator[Mapping[str, httpx.Client]]:
    """A client for each tenant, and `app`, without the scope admin."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(keyed.client(name)) for name in keyed.secrets}


@pytest.fixture(autouse=True)
def to_week(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time by weeks, from a Wednesday on, once everything that was counted is stored."""
    tallies = keyed.gateway.opened.tallies
    wednesday_s = int(time.time()) // WEEK_S * WEEK_S + 6 * 24 * 3600

    def to(weeks: float) -> None:
        wait_until(lambda: not tallies._pending and not tallies._storing.locked(), "the tallies to be stored")
        monkeypatch.setattr("time.time", lambda: wednesday_s + weeks * WEEK_S)

    to(0)
    return to


def people(client: httpx.Client, new_user: NewUser, tenant: str, arm: Arm, count: int) -> list[str]:
    """New users of an arm in this week, with profiles."""
    keys = UserKeys(SECRET, tenant)
    drawn = (user for user in iter(new_user, "") if arm_of(keys.key(user), HOLDOUT) is arm)
    users = list(islice(drawn, count))
    for user in users:
        put(client, user, ITEMS[:1])
    return users


def worth(client: httpx.Client) -> dict[str, Any]:
    told: dict[str, Any] = client.get("/worth").raise_for_status().json()
    return told


def counted(client: httpx.Client, count: int) -> dict[str, Any]:
    """What is known once so many people are counted in the running week."""
    wait_until(lambda: [week["people"] for week in worth(client)["running"]] == [count], f"{count} people")
    return worth(client)


def folded(client: httpx.Client) -> dict[str, Any]:
    wait_until(lambda: not worth(client)["running"], "the end of the week")
    return worth(client)


def stored(store: ValkeyProcess, pattern: str) -> list[str]:
    async def scan() -> list[str]:
        async with store.client() as raw:
            return sorted([name.decode() async for name in raw.scan_iter(pattern)])

    return asyncio.run(scan())


def answered(client: httpx.Client, user: str, **fields: Any) -> dict[str, Any]:
    return dict(generate(client, user, **fields).raise_for_status().json())


def test_level_is_compared_with_the_one_below_after_the_week(
    clients: Mapping[str, httpx.Client], new_user: NewUser, to_week: Callable[[float], None], keyed: Keyed
) -> None:
    client, each = clients["acme"], 32
    for arm, told in ((Arm.LOWER, FINAL | {"rating": "down"}), (Arm.FULL, {"outcome": "sent", "rating": "up"})):
        for user in people(client, new_user, "acme", arm, each):
            answer = answered(client, user)
            assert answer["personalization"]["arm"] == arm
            assert give(client, user, answer["id"], **told).json()["arm"] == arm
            answered(client, user)  # and no word about this one
    running = counted(client, 2 * each)
    assert (running["weeks"], running["comparisons"]) == ([], [])
    assert running["says"][0].startswith("nothing is known yet: people are counted once their week is over")
    to_week(1)
    known = folded(client)
    full, lower = known["weeks"]
    shared = {"week": running["running"][0]["week"], "level": "merged", "holdout": HOLDOUT, "people": each}
    numbers = {"answers": 2 * each, "feedback": each, "discarded": 0}
    assert full == {
        **shared | numbers,
        **{"arm": "full", "sent": each, "edited": 0, "up": each, "down": 0},
        "shares": {"changed": 0.0, "sent": 1.0, "discarded": 0.0, "up": 1.0, "silent": 0.5},
    }
    assert (lower["edited"], lower["sent"], lower["down"]) == (each, 0, each)
    changed = lower["shares"]["changed"]
    assert changed == pytest.approx(0.83, abs=0.1)
    found = {row["metric"]: row for row in known["comparisons"]}
    assert list(found) == ["changed", "sent", "discarded", "up", "silent"]
    assert found["sent"]["lower"] == {"people_weeks": each, "mean": 0.0}
    assert found["sent"]["difference"]["estimate"] == -1
    assert found["sent"]["difference"]["high"] < 0
    assert found["sent"]["says"].startswith("merged raises the share of answers sent as they are by 100.0 (")
    assert found["sent"]["says"].endswith(" points: keep it")
    assert found["changed"]["full"] == {"people_weeks": each, "mean": 0.0}  # what was sent as it is
    assert found["changed"]["difference"]["estimate"] == pytest.approx(changed)
    assert found["changed"]["says"].startswith("merged saves 100 % (")
    assert found["silent"]["difference"]["estimate"] == 0
    assert "not known yet; the level changes it by -" in found["silent"]["says"]
    assert known["says"] == [row["says"] for row in known["comparisons"]]

    assert error_of(clients["app"].get("/worth"))[:1] == (403,)
    nothing = worth(clients["fresh"])
    assert (nothing["weeks"], nothing["running"], nothing["comparisons"]) == ([], [], [])

    environment = {"MTA_API_KEY": keyed.secrets["acme"]}
    shown = CliRunner().invoke(app, ["worth", "--url", keyed.gateway.url], env=environment | {"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert all(sentence in shown.output.replace("\n", " ") for sentence in known["says"])
    assert "-100.0" in shown.output
    assert "50.0 %" in shown.output
    raw = CliRunner().invoke(app, ["worth", "--url", keyed.gateway.url, "--json"], env=environment)
    assert json.loads(raw.output) == known
    with mta_client.Client(keyed.gateway.url, key=keyed.secrets["acme"]) as api:
        assert api.worth().says == known["says"]
        (user,) = people(client, new_user, "acme", Arm.FULL, 1)  # arms are drawn anew each week
        told = api.feedback(user, api.generate(user, "any plans?").id, **FINAL)
        assert (told.outcome, told.learned, told.level) == ("edited", True, "merged")


def test_feedback_counts_in_the_week_of_its_answer(
    clients: Mapping[str, httpx.Client], new_user: NewUser, to_week: Callable[[float], None]
) -> None:
    client = clients["feedback"]
    (user,) = people(client, new_user, "feedback", Arm.LOWER, 1)
    streamed = chunks_of(generate(client, user, stream=True))
    named = streamed[0]["id"]
    late = answered(client, user)["id"]
    for told in ({"rating": "down"}, {"rating": "down"}, {"rating": "up"}, FINAL, FINAL, {"outcome": "discarded"}):
        give(client, user, named, **told).raise_for_status()
    with ThreadPoolExecutor(4) as pool:  # a click that arrives several times
        list(pool.map(lambda _: give(client, user, late, outcome="sent"), range(4)))
    counted(client, 1)
    to_week(5.2 / 7)  # Monday
    give(client, user, late, outcome="edited").raise_for_status()
    answered(client, user)
    wait_until(lambda: len(worth(client)["running"]) == 2, "the second week")
    to_week(1)
    wait_until(lambda: len(worth(client)["running"]) == 1, "the end of the first week")
    (row,) = worth(client)["weeks"]
    assert (row["arm"], row["level"], row["people"], row["answers"], row["feedback"]) == ("lower", "merged", 1, 2, 2)
    assert [row[what] for what in ("sent", "edited", "discarded", "up", "down")] == [0, 1, 1, 1, 0]
    exported = client.get(f"/users/{user}/export").json()["tally"]
    assert [(cell["level"], cell["answers"]) for cell in exported] == [("merged", 1)]
    assert exported[0]["week"] > row["week"]


def test_answers_that_are_not_compared_are_not_counted(
    clients: Mapping[str, httpx.Client], new_user: NewUser, fake_engine: FakeEngine, store: ValkeyProcess
) -> None:
    client = clients["fallback"]
    (user,) = people(client, new_user, "fallback", Arm.FULL, 1)
    fake_engine.turn(lacks=lambda model: model != "base")
    fell_back = answered(client, user)
    assert fell_back["personalization"]["level"] == "base"
    fake_engine.turn(lacks=lambda model: False)
    merged = answered(client, user, personalize="merged")
    weak = answered(client, user, strength=0.5)
    for answer in (fell_back, merged, weak):
        assert give(client, user, answer["id"], rating="up").json()["arm"] == "none"
    answered(client, user, personalize="none")
    answered(client, new_user())  # nothing is known about them

    off = clients["off"]
    put(off, user)
    for _ in range(2):
        assert give(off, user, answered(off, user)["id"], **FINAL).json()["arm"] == "none"
    time.sleep(0.3)  # several rounds of what stores tallies
    assert worth(client)["running"] == worth(off)["running"] == []
    assert stored(store, "mta:worth:*fallback") == stored(store, "mta:worth:*off") == []
    keys = (UserKeys(SECRET, tenant).key(user) for tenant in ("fallback", "off"))
    assert [stored(store, f"mta:{{{key}}}:tally") for key in keys] == [[], []]
    assert worth(off)["says"][0].startswith("nothing is compared yet: hold out a share of users")


@pytest.mark.usefixtures("fake_engine")
def test_what_is_not_stored_yet_is_stored_at_the_end(
    gateway_settings: Settings,
    store: ValkeyProcess,
    keyed: Keyed,
    new_user: NewUser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.gateway.opening.STORE_INTERVAL_S", 3600)
    with GatewayThread(gateway_settings, redis_url=store.url, holdout=HOLDOUT) as gateway:
        one = Keyed(gateway, keyed.secrets)
        with one.client("fresh") as client:
            (user,) = people(client, new_user, "fresh", Arm.FULL, 1)
            answered(client, user)
            assert worth(client)["running"] == []
    with keyed.client("fresh") as client:
        assert counted(client, 1)
