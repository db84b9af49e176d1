"""`mta keys` on a store, and the gateways over it: without keys, with the first one, and with the store away."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner, Result

from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.cli import app
from server.settings import Settings
from tests.support.gateway import GatewayThread

ID = re.compile(r"key ([0-9a-f]{12}) ")


@pytest.fixture(scope="module")
def gateways(gateway_settings: Settings, store: ValkeyProcess) -> Iterator[list[GatewayThread]]:
    """Two of them, over a store in which no key was ever made."""
    settings = gateway_settings.model_copy(update={"redis_url": store.url})
    with GatewayThread(settings) as one, GatewayThread(settings) as other:
        yield [one, other]


@pytest.fixture
def keys(store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Keys]]:
    monkeypatch.setenv("MTA_REDIS_URL", store.url)
    yield Keys


class Keys:
    """`mta keys`."""

    @staticmethod
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", *arguments])

    @classmethod
    def create(cls, *arguments: str) -> tuple[str, str]:
        """A new key and its id."""
        made = cls.run("create", *arguments)
        assert made.exit_code == 0, made.output
        found = ID.search(made.stderr)
        assert found
        return made.stdout.strip(), found[1]


def status(gateway: GatewayThread, secret: str = "", host: str = "127.0.0.1", path: str = "/v1/models") -> int:
    headers = {"Host": host} | ({"Authorization": f"Bearer {secret}"} if secret else {})
    return httpx.get(f"{gateway.url}{path}", headers=headers).status_code


def test_without_keys_this_machine_alone_is_answered(gateways: list[GatewayThread]) -> None:
    for path in ("/v1/models", "/health", "/ready", "/", "/console", "/metrics", "/no-such-route"):
        assert status(gateways[0], path=path) != httpx.codes.FORBIDDEN
        for host in ("mta.example.org", "127.0.0.1.example.org", "192.168.0.7:8000", "0.0.0.0", ""):
            refused = httpx.get(f"{gateways[0].url}{path}", headers={"Host": host, "X-Forwarded-Host": "127.0.0.1"})
            assert refused.status_code == httpx.codes.FORBIDDEN
            assert "mta keys create" in refused.json()["error"]["message"]
    assert status(gateways[0], "whatever") == httpx.codes.OK


def test_keys_count_in_every_gateway_and_no_more_once_revoked(gateways: list[GatewayThread], keys: type[Keys]) -> None:
    first, first_id = keys.create("first", "--first")
    again = keys.run("create", "second", "--first")
    assert (again.exit_code, again.stdout) == (0, "")
    for gateway in gateways:
        wait_until(lambda gateway=gateway: status(gateway) == 401, "the key to be wanted")  # type: ignore[misc]
        assert status(gateway, first) == httpx.codes.OK
        assert status(gateway, first, path="/metrics") == httpx.codes.OK
        assert status(gateway, first, host="mta.example.org") == httpx.codes.OK
    assert keys.run("revoke", first_id).exit_code == 0
    assert "was revoked before" in keys.run("revoke", first_id).output
    for gateway in gateways:
        wait_until(lambda gateway=gateway: status(gateway, first) == 401, "the key to be revoked")  # type: ignore[misc]
        assert status(gateway) == httpx.codes.UNAUTHORIZED, "nothing opens when the last key is gone"
    assert keys.run("create", "third", "--first").stdout == ""


def test_a_key_can_have_limits_of_its_own(
    gateways: list[GatewayThread], keys: type[Keys], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    few, few_id = keys.create("few", "--requests", "2", "--tokens", "0")
    many, _ = keys.create("many")
    for gateway in gateways:
        wait_until(lambda gateway=gateway: status(gateway, many) == 200, "the keys to count")  # type: ignore[misc]
    asked = [status(gateway, few, path="/users/nobody") for gateway in [*gateways, *gateways]]
    assert asked == [404, 404, 429, 429]
    assert [status(gateway, many, path="/users/nobody") for gateway in gateways] == [404, 404]
    (line,) = [line for line in keys.run("list").stdout.splitlines() if few_id in line]
    assert "requests 2, tokens any" in line


def test_while_the_store_is_away_known_keys_count_and_nothing_opens(
    gateways: list[GatewayThread], keys: type[Keys], store: ValkeyProcess
) -> None:
    secret, _ = keys.create("app")
    for gateway in gateways:
        wait_until(lambda gateway=gateway: status(gateway, secret) == 200, "the key to count")  # type: ignore[misc]
    store.kill()
    try:
        for gateway in gateways:
            assert status(gateway, secret) == httpx.codes.OK
            assert status(gateway) == httpx.codes.UNAUTHORIZED
            assert status(gateway, secret, path="/users/ada") == httpx.codes.SERVICE_UNAVAILABLE
        assert "MTA_REDIS_URL" in str(keys.run("list").exception)
    finally:
        store.start()
    assert status(gateways[0], secret) == httpx.codes.OK


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "x" * 65), "64 printable"),
        (("create", "a\nb"), "64 printable"),
        (("create", "app", "--tenant", ""), "tenant"),
        (("revoke", "000000000000"), "mta keys list"),
    ],
)
def test_what_makes_no_sense_is_said(keys: type[Keys], arguments: tuple[str, ...], said: str) -> None:
    result = keys.run(*arguments)
    assert result.exit_code != 0
    assert said in str(result.exception) + result.output
