"""`mta gateway` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import fcntl
import signal
import socket
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest
from typer.testing import CliRunner

from adapters.errors import MtaError
from bank.models.folders import DEFAULT_EMBEDDER_NAME
from bench.rig.processes import mta, running, wait_until
from bench.rig.valkey import free_port
from server.cli import app
from server.cli.run import gateway
from server.settings import Settings
from tests.support.fake_engine import KEY, FakeEngine
from tests.support.gateway import SECRET, wait_until_ready

Environment = dict[str, str | None]


@pytest.fixture
def environment(gateway_settings: Settings, fake_engine: FakeEngine) -> Environment:
    """A good environment for a gateway process, on a free port."""
    given = {"bank", "embedder", "redis_url", "engine_url"}
    named = {name: str(value) for name, value in gateway_settings.model_dump(include=given).items()}
    named |= {"secret": SECRET, "engine_key": KEY, "port": str(free_port())}
    return {f"MTA_{name.upper()}": value for name, value in named.items()}


def refusal(environment: Environment, *options: str) -> str:
    """The one line that a gateway leaves that must not start."""
    with running(mta("gateway", *options), environment) as process:
        assert process.wait() == 1
        lines = [line for line in process.output.splitlines() if line]
    assert len(lines) == 1, process.output
    assert lines[0].startswith("error: ")
    return lines[0]


def test_it_finishes_answers_and_frees_its_port_when_it_ends(environment: Environment, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.token_delay_s = 0.05
    body = {"user_id": "ada", "prompt": "x", "max_tokens": 20, "stream": True}
    with httpx.Client(base_url=f"http://127.0.0.1:{environment['MTA_PORT']}", timeout=30) as client:
        with running(mta("gateway"), environment) as process:
            process.wait_for("listening on")
            with client.stream("POST", "/generate", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send(signal.SIGTERM)
                assert "data: [DONE]" in list(lines)
            assert process.wait() == 0
        with running(mta("gateway"), environment) as process:
            process.wait_for("listening on")
            wait_until_ready(client)
            for _ in range(2):
                process.send(signal.SIGTERM)
            assert process.wait() == 0
            assert "Traceback" not in process.output


def test_the_log_names_routes_and_never_users_or_prompts(environment: Environment) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(mta("gateway", "--port", str(port)), environment) as process:  # options go before the environment
        process.wait_for(f"listening on {url}")
        with httpx.Client(base_url=url, timeout=60) as client:
            client.put("/users/unmistakable/profile", json={"items": [{"text": "secret history"}]}).raise_for_status()
            client.post("/generate", json={"user_id": "unmistakable", "prompt": "secret prompt", "max_tokens": 1})
        process.wait_for(r"PUT /users/\{user_id\}/profile 200 [\d.]+ ms request=[0-9a-f]{24}$")
        process.wait_for(r"POST /generate 200 [\d.]+ ms gen-[0-9a-f]+ merged$")
        assert f"cannot listen on 127.0.0.1:{port}" in refusal(environment, "--port", str(port))
        assert httpx.get(f"{url}/health").status_code == 200
    assert "unmistakable" not in process.output
    assert "secret" not in process.output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"MTA_BANK": None}, "MTA_BANK"),
        ({"MTA_BANK": "/nowhere"}, "no bank at /nowhere"),
        ({"MTA_EMBEDDER": "/nowhere"}, "no embedder at /nowhere"),
        ({"MTA_SECRET": None}, "MTA_SECRET"),
        ({"MTA_SECRET": "short"}, "MTA_SECRET"),
        ({"MTA_REDIS_URL": "redis://127.0.0.1:1/0"}, "Connection refused"),
        ({"MTA_HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        ({"MTA_HOST": "::"}, "`mta keys create NAME`"),  # while there is no key
    ],
)
def test_what_it_cannot_serve_with_is_refused_and_named(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, changes: Environment, reason: str
) -> None:
    for changing in ("end_on_signals", "log_to_stderr", "gc"):  # this process, in which a start takes a tenth
        monkeypatch.setattr(gateway, changing, MagicMock())
    for name, value in (environment | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(MtaError) as refused:
        CliRunner().invoke(app, ["gateway"], catch_exceptions=False)
    assert reason in str(refused.value)
    assert "short'" not in str(refused.value)


class TestSignalsDuringTheStart:
    def test_while_it_waits_for_the_embedder(self, environment: Environment, tmp_path: Path) -> None:
        lock = tmp_path / "embedders" / f".{DEFAULT_EMBEDDER_NAME}.lock"  # as a process holds that makes it
        lock.parent.mkdir()
        with lock.open("w") as making:
            fcntl.flock(making, fcntl.LOCK_EX)
            waits = environment | {"MTA_EMBEDDER": None, "MTA_CACHE_DIR": str(tmp_path)}
            with running(mta("gateway"), waits) as process:
                wait_until(lambda: str(lock) in opened(process.process.pid), "it to wait for the lock")
                process.send(signal.SIGINT)
                assert process.wait() == 0, process.output
        assert "Traceback" not in process.output

    def test_while_the_store_is_silent(self, environment: Environment) -> None:
        with socket.create_server(("127.0.0.1", 0)) as store:
            url = f"redis://127.0.0.1:{store.getsockname()[1]}/0"
            with running(mta("gateway"), environment | {"MTA_REDIS_URL": url}) as process:
                connection, _ = store.accept()
                process.send(signal.SIGTERM)
                assert process.wait() == 0, process.output
                connection.close()
        assert "Traceback" not in process.output


def opened(pid: int) -> set[str]:
    """The files that a process has open."""
    found = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(str(handle.readlink()))
    return found
