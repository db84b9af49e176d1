"""`mta keys` on a store, and the gateways over it: without keys, with the first one, and with the store away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date

import httpx
import pytest
import redis
from typer.testing import Result

from adapters.errors import MtaError
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from server.store.tenants.access_keys import digest_of
from tests.integration.security.conftest import create, keys
from tests.support.gateway import GatewayThread

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture(scope="module")
def gateways(gateway_settings: Settings, store: ValkeyProcess) -> Iterator[list[GatewayThread]]:
    """Two of them, over a store in which no key was ever made."""
    with ExitStack() as stack:
        yield [stack.enter_context(GatewayThread(gateway_settings, redis_url=store.url)) for _ in range(2)]


def status(gateway: GatewayThread, secret: str = "", host: str = "127.0.0.1", path: str = "/v1/models") -> int:
    headers = {"Host": host} | ({"Authorization": f"Bearer {secret}"} if secret else {})
    return httpx.get(f"{gateway.url}{path}", headers=headers).status_code


def wait_for(gateways: list[GatewayThread], code: int, secret: str = "") -> None:
    wait_until(lambda: {status(gateway, secret) for gateway in gateways} == {code}, f"a {code} from every gateway")


def test_without_keys_this_machine_alone_is_answered(gateways: list[GatewayThread]) -> None:
    for path in ("/v1/models", "/health", "/ready", "/", "/console", "/metrics", "/no-such-route"):
        assert status(gateways[0], path=path) != httpx.codes.FORBIDDEN
        for host in ("mta.example.org", "127.0.0.1.example.org", "192.168.0.7:8000", "0.0.0.0", ""):
            refused = httpx.get(f"{gateways[0].url}{path}", headers={"Host": host, "X-Forwarded-Host": "127.0.0.1"})
            assert refused.status_code == httpx.codes.FORBIDDEN
            assert "mta keys create" in refused.json()["error"]["message"]
    assert status(gateways[0], "whatever") == httpx.codes.OK


def test_keys_count_in_every_gateway_and_no_more_once_revoked(gateways: list[GatewayThread]) -> None:
    first, first_id = create("first", "--first")
    again = keys("create", "second", "--first")
    assert (again.exit_code, again.stdout) == (0, "")
    wait_for(gateways, 401)
    for gateway in gateways:
        assert status(gateway, first) == httpx.codes.OK
        assert status(gateway, first, path="/metrics") == httpx.codes.OK
        assert status(gateway, first, host="mta.example.org") == httpx.codes.OK
    assert keys("revoke", first_id).exit_code == 0
    assert "was revoked before" in keys("revoke", first_id).output
    wait_for(gateways, 401, first)
    assert {status(gateway) for gateway in gateways} == {401}, "nothing opens when the last key is gone"
    assert keys("create", "third", "--first").stdout == ""


class TestGiven:
    """The operator makes the first key, `mta keys` keeps it."""

    GIVEN = "mta_" + "0123456789abcdef" * 4

    @pytest.fixture(autouse=True)
    def over_an_empty_store(self, environment: None, store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        url = store.url.removesuffix("/0") + "/1"  # another database, which no gateway uses
        with redis.Redis.from_url(url) as raw:
            raw.flushdb()
        monkeypatch.setenv("MTA_REDIS_URL", url)

    def given(self, monkeypatch: pytest.MonkeyPatch, secret: str) -> Result:
        monkeypatch.setenv("MTA_FIRST_KEY", secret)
        return keys("create", "first", "--first", "--given")

    def test_first_key_given_again_counts_once_and_stays_unprinted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key_id, listed = digest_of(self.GIVEN.encode())[:12], []
        for _ in range(3):
            kept = self.given(monkeypatch, self.GIVEN)
            assert (kept.exit_code, kept.stdout) == (0, "")
            assert self.GIVEN[4:12] not in kept.output
            assert key_id in kept.stderr
            listed.append(keys("list").stdout)
        assert listed[0].count(key_id) == 1
        assert "admin" in listed[0]
        assert listed[1:] == listed[:1] * 2
        another = self.given(monkeypatch, "mta_" + "fedcba9876543210" * 4)
        assert (another.exit_code, another.stdout) == (0, "")
        assert "none was created" in another.stderr
        assert keys("list").stdout == listed[0]

    @pytest.mark.parametrize(
        "secret",
        ["short", "mta_" + "0123456789" * 3, "0123456789abcdef" * 4, "mta_" + "ab" * 40, f"{GIVEN}\n", f"{GIVEN} x"],
    )
    def test_a_guessable_one_is_refused_and_not_repeated(self, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
        refused = self.given(monkeypatch, secret)
        assert isinstance(refused.exception, MtaError)
        assert "MTA_FIRST_KEY must be `mta_`" in str(refused.exception)
        assert secret.strip() not in str(refused.exception) + refused.output
        assert "mta_" not in keys("list").stdout

    def test_without_one_it_says_how_to_make_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for none in (keys("create", "first", "--given"), self.given(monkeypatch, "")):
            assert (none.exit_code, none.stdout) == (0, "")
            assert "`mta keys create first --first`" in none.stderr
        assert create("first", "--first")[0].startswith("mta_")


def test_a_key_can_have_limits_of_its_own(gateways: list[GatewayThread]) -> None:
    few, few_id = create("few", "--requests", "2", "--tokens", "0")
    many, _ = create("many", "--days", "30", "--note", "until the trial ends")
    wait_for(gateways, 200, many)
    asked = [status(gateway, few, path="/users/nobody") for gateway in [*gateways, *gateways]]
    assert asked == [404, 404, 429, 429]
    assert [status(gateway, many, path="/users/nobody") for gateway in gateways] == [404, 404]
    (line,) = [line for line in keys("list").stdout.splitlines() if few_id in line]
    assert "requests 2, tokens any" in line
    (line,) = [line for line in keys("list").stdout.splitlines() if " many " in line]
    assert "until the trial ends" in line
    assert str(date.fromtimestamp(time.time() + 30 * 24 * 3600)) in line


def test_while_the_store_is_away_known_keys_still_count(gateways: list[GatewayThread], store: ValkeyProcess) -> None:
    secret, _ = create("app")
    wait_for(gateways, 200, secret)
    store.kill()
    try:
        for gateway in gateways:
            assert status(gateway, secret) == httpx.codes.OK
            assert status(gateway) == httpx.codes.UNAUTHORIZED
            assert status(gateway, secret, path="/users/ada") == httpx.codes.SERVICE_UNAVAILABLE
        assert "MTA_REDIS_URL" in str(keys("list").exception)
    finally:
        store.start()
    assert status(gateways[0], secret) == httpx.codes.OK


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "x" * 65), "64 printable"),
        (("create", "a\nb"), "64 printable"),
        (("create", "app", "--tenant", ""), "tenant"),
        (("create", "app", "--note", "x" * 201), "200 printable"),
        (("create", "app", "--days", "0"), "days"),
        (("revoke", "000000000000"), "mta keys list"),
    ],
)
def test_what_makes_no_sense_is_said(arguments: tuple[str, ...], said: str) -> None:
    result = keys(*arguments)
    assert result.exit_code != 0
    assert said in str(result.exception) + result.output
