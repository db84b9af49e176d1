"""The versions of a user's adapter over the API: what is listed, and going back, also where adapters are refreshed."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest
from httpx import Client
from typer.testing import CliRunner

import mta_client
from server.cli import app
from server.settings import Settings
from server.store.samples import Sample, encode_sample
from tests.support.calls import FINAL, NewUser, error_of, give, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate
from tests.support.store_parts import StoreParts, WorkerSteps, submitted

OTHER_BANK = "00000000"
_numbers = itertools.count()


async def _promote(gateway: GatewayThread, user_id: str, bank: str, *, submits: bool) -> str:
    async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
        key, worker = gateway.key(user_id), WorkerSteps(parts, bank or gateway.parts.bank.manifest.short)
        if submits:
            sample = encode_sample(Sample([], f"answer {next(_numbers)}")).decode()
            await submitted(parts.jobs, key, sample, bank=worker.bank)
        async with asyncio.timeout(30):
            while worker.lease is None or worker.lease.job.id.user_key != key:
                await worker.take()
                await worker.claim()
        adapter = await worker.promote()
        assert adapter is not None
        return adapter


def promoted(gateway: GatewayThread, user_id: str, bank: str = "", *, submits: bool = True) -> str:
    """Let a user have one more version, by the id of its adapter; without `submits`, as a job that waits."""
    return asyncio.run(_promote(gateway, user_id, bank, submits=submits))


def listed(client: Client, user_id: str) -> list[tuple[int, bool]]:
    adapters = client.get(f"/users/{user_id}/adapters").raise_for_status().json()["adapters"]
    return [(version["version"], version["serving"]) for version in adapters]


def test_a_version_is_listed_and_serves_again(
    client: Client, ada: str, gateway: GatewayThread, fake_engine: FakeEngine, log: Path
) -> None:
    fake_engine.knobs.user_adapters = True
    assert listed(client, ada) == []
    made = [promoted(gateway, ada) for _ in range(2)]
    assert listed(client, ada) == [(2, True), (1, False)]
    for number in (1, 2, 1):
        chosen = client.post(f"/users/{ada}/adapters/{number}/serve").raise_for_status().json()
        assert (chosen["id"], chosen["serving"], chosen["stale"]) == (made[number - 1], True, False)
        assert (chosen["samples"], chosen["rank"], chosen["before"], chosen["after"]) == (10, 2, 2.0, 1.0)
        assert who(generate(client, ada))["level"] == "stacked"
        assert fake_engine.seen[-1].body["model"].endswith(f".{made[number - 1]}")
    assert client.post(f"/users/{ada}/adapters/1/serve").json() == chosen  # again
    assert listed(client, ada) == [(2, False), (1, True)]
    assert client.get(f"/users/{ada}").json()["adapter"]["id"] == made[0]
    export = client.get(f"/users/{ada}/export").raise_for_status().json()
    assert (export["adapter"]["id"], [version["note"]["id"] for version in export["adapters"]]) == (made[0], made[::-1])
    acts = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(act["act"], act["outcome"], act["user"]) for act in acts[:4]] == [("serve", "200", gateway.key(ada))] * 4
    assert client.delete(f"/users/{ada}").json()["erased"]["adapters"] == 2


def test_a_version_that_cannot_serve_is_refused(
    client: Client, ada: str, gateway: GatewayThread, new_user: NewUser
) -> None:
    promoted(gateway, ada, OTHER_BANK)
    assert listed(client, ada) == [(1, True)]
    refused = client.post(f"/users/{ada}/adapters/1/serve")
    assert error_of(refused) == (409, "version", "other_bank")
    assert "mta readapt" in refused.json()["error"]["message"]
    promoted(gateway, ada)
    assert error_of(client.post(f"/users/{ada}/adapters/1/serve")) == (409, "version", "other_bank")
    assert error_of(client.post(f"/users/{ada}/adapters/9/serve")) == (404, "version", "unknown_version")
    assert error_of(client.post(f"/users/{ada}/adapters/none/serve"))[:2] == (400, "version")
    assert error_of(client.post(f"/users/{new_user()}/adapters/1/serve")) == (404, "version", "unknown_version")
    assert error_of(client.get(f"/users/{new_user()}/adapters")) == (404, "user_id", "not_found")
    assert listed(client, ada) == [(2, True), (1, False)]


def test_after_going_back_refreshing_waits_for_new_texts(gateway_settings: Settings, new_user: NewUser) -> None:
    user_id = new_user()
    with GatewayThread(gateway_settings, refresh_samples=2, refresh_hours=0) as own, own.client() as client:

        def taught(number: int) -> bool:
            answer, final = generate(client, user_id).json()["id"], {"final": f"wave number {number}"}
            said = give(client, user_id, answer, **FINAL | final)
            return said.raise_for_status().json()["job"] is not None

        assert [taught(0), taught(1)] == [False, True]
        promoted(own, user_id, submits=False)
        assert not taught(2)
        promoted(own, user_id)
        client.post(f"/users/{user_id}/adapters/1/serve").raise_for_status()
        assert [taught(3), taught(4)] == [False, True]  # the third text, which version 1 has not seen, does not count


def test_client_and_command_list_versions_and_go_back(ada: str, gateway: GatewayThread) -> None:
    made = [promoted(gateway, ada) for _ in range(2)]
    with mta_client.Client(gateway.url) as api:
        assert [(version["version"], version["serving"]) for version in api.adapters(ada)] == [(2, True), (1, False)]
        assert api.serve(ada, 1)["id"] == made[0]
        done = CliRunner().invoke(app, ["users", "adapters", ada, "--url", gateway.url, "--serve", "2"])
        rows = [line.replace("│", " ").split() for line in done.output.splitlines() if "MB" in line or "bytes" in line]
        assert [(row[0], row[-1] == "serves") for row in rows] == [("2", True), ("1", False)]
        assert api.adapters(ada)[0]["serving"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_choice_that_others_always_disturb_is_given_up(
    client: Client, ada: str, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    promoted(gateway, ada)
    serve, tries = gateway.parts.adapting.adapters.serve, itertools.count(1)

    async def disturbed(*given: object) -> bool:
        return not fails and next(tries) > 1 and await serve(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(gateway.parts.adapting.adapters, "serve", disturbed)
    answer = client.post(f"/users/{ada}/adapters/1/serve")
    assert answer.json()["error"]["code"] == "contention" if fails else answer.status_code == 200
