"""`mta up` as people use it: one command, nothing left behind. A stand-in for vLLM keeps each start short."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from bench.rig.processes import PATIENCE_S, alive, command_line, descendants, mta, running, wait_until
from bench.rig.up import READY, Up, up, up_command
from bench.rig.valkey import ValkeyProcess
from server.engine.command import memory_bytes
from server.store.backup.folder import open_copy
from server.store.redis import keys
from tests.support import calls
from tests.support.fake_engine import KEY, FakeEngine
from tests.support.valkeys.cluster import ask

PROFILE = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}

StartUp = Callable[..., AbstractContextManager[Up]]


@pytest.fixture(scope="module")
def options(tiny_bank_folder: Path, fake_engine_server: FakeEngine) -> tuple[str, ...]:
    return ("--bank", str(tiny_bank_folder), "--engine-url", fake_engine_server.url)


@pytest.fixture(scope="module")
def start(options: tuple[str, ...], embedder_folder: Path) -> StartUp:
    environment = {"MTA_ENGINE_KEY": KEY, "MTA_EMBEDDER": str(embedder_folder)}
    return lambda data, *more: up(data, *options, *more, environment=environment)


@pytest.fixture(scope="module")
def running_up(start: StartUp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One for all tests after which it runs as before."""
    with start(tmp_path_factory.mktemp("up") / "data") as started:
        yield started


@pytest.fixture(scope="module")
def refused(options: tuple[str, ...]) -> Callable[..., str]:
    """Runs a `mta up` that must fail, and gives its output."""

    def run(data: Path, *more: str) -> str:
        command, clean = up_command(data, *options, *more)
        with running(command, clean | {"MTA_ENGINE_KEY": KEY}) as process:
            assert process.wait() == 1, process.output
            return process.output

    return run


def test_up_prints_a_line_per_part_and_bounds_store_memory(
    running_up: Up,
) -> None:
    output = running_up.process.output
    for part in ("valkey", "gateway"):
        assert f"  {part:<9}starting" in output
        assert f"  {part:<9}ready" in output
        assert (running_up.data / "logs" / f"{part}.log").exists()
    assert f"curl -s {running_up.url}/generate" in output
    assert f"console: {running_up.url}/console" in output
    with running_up.client() as client:
        assert client.put("/users/ada/profile", json=PROFILE).status_code == 200
        answer = client.post("/generate", json={"user_id": "ada", "prompt": "Hello"}).json()
        assert answer["personalization"]["level"] == "merged"
    options = dict(line.split(" ", 1) for line in (running_up.data / "valkey.conf").read_text().splitlines())
    assert memory_bytes() // 16 < int(options["maxmemory"]) <= memory_bytes() // 8
    shown = re.search(r"^mta_store_max_bytes (\S+)", httpx.get(f"{running_up.url}/metrics").text, re.MULTILINE)
    assert shown and float(shown[1]) == int(options["maxmemory"])


def test_secrets_stay_out_of_command_lines_and_readable_files(running_up: Up) -> None:
    secret = (running_up.data / "secret").read_text().strip()
    config = (running_up.data / "valkey.conf").read_text()
    password = config.partition("requirepass ")[2].split()[0]
    for pid in [running_up.pid, *descendants(running_up.pid)]:
        for text in (secret, password, KEY):
            assert text not in command_line(pid)
    assert stat.S_IMODE(running_up.data.stat().st_mode) == 0o700
    for name in ("secret", "valkey.conf"):
        assert stat.S_IMODE((running_up.data / name).stat().st_mode) == 0o600


def stops_with_every_part(started: Up, number: signal.Signals) -> bool:
    """Whether `mta up` ends well, and all its parts with it, when it alone gets a signal."""
    family = descendants(started.pid)
    assert len(family) >= 2  # a part and its guard
    started.process.send(number)
    return started.process.wait(2 * PATIENCE_S) == 0 and not any(map(alive, family))


def test_killed_up_leaves_no_process_and_the_next_has_the_data(start: StartUp, tmp_path: Path) -> None:
    with start(tmp_path / "data") as first:
        with first.client() as client:
            before = client.put("/users/ada/profile", json=PROFILE).json()
        family = descendants(first.pid)
        first.process.send(signal.SIGKILL)
        first.process.wait()
    with start(tmp_path / "data") as second:
        assert not any(map(alive, family))
        second.process.stop_reading()  # nobody reads its output any more
        for name in ("gateway", "valkey"):
            pid = second.part(name)
            assert pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda it=(None, pid), name=name: second.part(name) not in it, f"a new {name}")  # type: ignore[misc]
            wait_until(second.ready, "all to be back")
        wait_until(lambda: httpx.get(f"{second.url}/users/ada").is_success, "the gateway to reach its store")
        assert httpx.get(f"{second.url}/users/ada").json()["recipe"] == before["recipe"]
        assert stops_with_every_part(second, signal.SIGTERM)


def test_second_up_needs_a_data_folder_of_its_own(
    running_up: Up, start: StartUp, refused: Callable[..., str], tmp_path: Path
) -> None:
    output = refused(running_up.data, "--port", "0")
    assert f"in use by another `mta up` (process {running_up.pid})" in output
    with start(tmp_path / "other") as other:
        assert other.url != running_up.url
        assert other.ready() and running_up.ready()
        with running_up.client() as one, other.client() as two:
            one.put("/users/ada/profile", json=PROFILE).raise_for_status()
            assert two.get("/users/ada").status_code == 404
            command = mta("keys", "create", "first", "--first", "--data", str(other.data))
            secret = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            wait_until(lambda: two.get("/v1/models").status_code == httpx.codes.UNAUTHORIZED, "the key to be wanted")
            assert two.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == httpx.codes.OK
        assert other.ready()
        assert not any(secret in command_line(pid) for pid in [other.pid, *descendants(other.pid)])
        assert secret not in other.process.output
        assert stops_with_every_part(other, signal.SIGHUP)


def test_what_cannot_start_is_explained(running_up: Up, refused: Callable[..., str], tmp_path: Path) -> None:
    port = running_up.url.rpartition(":")[2]
    output = refused(tmp_path / "other", "--port", port)
    assert f"127.0.0.1:{port}: Address already in use" in output
    assert "starting" not in output
    assert not (tmp_path / "other").exists()
    output = refused(tmp_path / "data", "--port", "0", "--redis-url", "redis://127.0.0.1:1/0")
    assert "gateway ended with status" in output
    assert "127.0.0.1:1" in output.partition("The end of ")[2]


def test_up_after_a_broken_restore_waits_and_tells_the_remedy(
    options: tuple[str, ...], embedder_folder: Path, tmp_path: Path
) -> None:
    data, environment = tmp_path / "data", {"MTA_ENGINE_KEY": KEY, "MTA_EMBEDDER": str(embedder_folder)}
    with ValkeyProcess(data / "valkey") as server:
        calls.mta("backup", "--out", tmp_path, MTA_REDIS_URL=server.url)
        (copy,) = tmp_path.glob("*Z")
        ask(server, "SET", keys.RESTORING, open_copy(copy).sha256)
    command, clean = up_command(data, *options, "--port", "0")
    with running(command, clean | environment) as process:
        process.wait_for(rf"valkey +starting +a restore was broken off: run `mta restore COPY --data {data}` again")
        assert "gateway" not in process.output
        calls.mta("restore", copy, "--without-erasures", "--data", data)
        process.wait_for(READY)
