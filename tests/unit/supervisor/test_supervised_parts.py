"""What `mta up` supervises: the data folder, and Valkey, engine and gateway as parts."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
from pathlib import Path

import pytest
import redis.asyncio

from bench.rig.processes import PATIENCE_S, command_line, descendants
from server.settings import Settings
from server.supervisor.data_folder import DataFolder
from server.supervisor.parts import StartError
from server.supervisor.router import router_part
from server.supervisor.services import (
    DRAIN_S,
    STOP_S,
    check_port,
    engine_part,
    free_port,
    gateway_part,
    valkey_part,
    worker_part,
)
from server.supervisor.supervisor import GRACE_S, GuardedProcess


def test_a_data_folder_in_use_is_refused_with_the_pid_of_its_user(data: DataFolder) -> None:
    with pytest.raises(StartError, match=rf"in use by another `mta up` \(process {os.getpid()}\)"):
        DataFolder.open(data.path)


def test_the_secret_is_made_once_and_private(tmp_path: Path) -> None:
    first = DataFolder.open(tmp_path / "data")
    first.close()
    second = DataFolder.open(tmp_path / "data")
    second.close()
    assert first.secret == second.secret
    assert stat.S_IMODE((tmp_path / "data" / "secret").stat().st_mode) == 0o600


def test_an_emptied_secret_is_refused_not_replaced(tmp_path: Path) -> None:
    DataFolder.open(tmp_path / "data").close()
    (tmp_path / "data" / "secret").write_text("")
    with pytest.raises(StartError, match="holds no secret"):
        DataFolder.open(tmp_path / "data")


async def test_valkey_is_durable_and_bounded_asks_for_its_password_and_shows_it_to_nobody(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / 'a "quoted" folder')
    part, url = valkey_part(data, 100 << 20)
    password = url.split(":")[2].split("@")[0]
    config = Path(part.command[1])
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    process = await GuardedProcess.start(part, data.log("valkey"))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await part.ready():
                assert process.running, process.log_tail()
                await asyncio.sleep(0.05)
        async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
            assert (await client.config_get("append*"))["appendonly"] == "yes"
            assert (await client.config_get("append*"))["appendfsync"] == "always"
            assert await client.config_get("maxmemory") == {"maxmemory": str(100 << 20)}
            assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            logs = await client.config_get("slowlog-max-len", "commandlog-*-max-len")
            assert len(logs) == 4
            assert set(logs.values()) == {"0"}  # none of them keeps what people wrote
        async with redis.asyncio.Redis.from_url(url.replace(password, "")) as stranger:
            with pytest.raises(redis.AuthenticationError):
                await stranger.ping()
        for pid in descendants(os.getpid()):
            assert password not in command_line(pid)
    finally:
        await process.stop(PATIENCE_S, asyncio.Event())
        data.close()
    assert list(data.valkey.glob("appendonlydir/*.aof"))


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_parts_that_have_to_be_killed_are_gone_in_the_time_that_the_page_says(tmp_path: Path, replicas: int) -> None:
    data = DataFolder.open(tmp_path / "data")
    settings = Settings(drain_s=DRAIN_S)
    parts = [valkey_part(data, 100 << 20)[0], gateway_part(settings), worker_part(settings, data.log("worker"))]
    parts += [engine_part(settings, [], {})] * replicas + [router_part(settings)] * (replicas > 1)
    data.close()
    page = (Path(__file__).parents[3] / "docs/running.md").read_text("utf-8")
    said = re.search(r"all within (\d+) s\s\(with `--replicas`, (\d+) s more for each engine\)", page)
    assert said
    assert int(said[1]) == STOP_S
    more_s = int(said[2]) * replicas if replicas > 1 else 0
    assert sum(part.stop_timeout_s + GRACE_S for part in parts) < STOP_S + more_s


def test_the_gateway_gets_every_setting_by_environment_and_no_secret_by_argv(tmp_path: Path) -> None:
    settings = Settings(secret="s" * 32, engine_key="k" * 32, bank=tmp_path, profile_items=7)  # type: ignore[arg-type]
    part = gateway_part(settings)
    assert part.environment["MTA_SECRET"] == "s" * 32
    assert part.environment["MTA_ENGINE_KEY"] == "k" * 32
    assert part.environment["MTA_BANK"] == str(tmp_path)
    assert part.environment["MTA_PROFILE_ITEMS"] == "7"
    assert not {"s" * 32, "k" * 32} & set(part.command)


def test_the_engine_keeps_its_processes_on_loopback() -> None:
    settings = Settings(engine_key="k" * 32, engine_url="http://127.0.0.1:1")  # type: ignore[arg-type]
    part = engine_part(settings, ["vllm"], {"VLLM_API_KEY": "k" * 32})
    assert part.environment["VLLM_API_KEY"] == "k" * 32
    assert part.environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert part.environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_router_gets_every_engine_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTA_SECRET", "MTA_ENGINE_KEY"):
        monkeypatch.setenv(name, "e" * 32)
    monkeypatch.setenv("RUST_LOG", "info")
    settings = Settings(engine_urls="http://a:1,http://b:2", router_port=3, engine_key="k" * 32)  # type: ignore[arg-type]
    part = router_part(settings)
    assert part.command[part.command.index("--worker-urls") + 1 :] == ("http://a:1", "http://b:2")
    assert part.command[part.command.index("--policy") + 1] == "consistent_hash"
    assert not {"k" * 32, "e" * 32} & {*part.environment.values(), *part.command}
    assert "RUST_LOG" not in part.environment  # it would have every recipe logged


def test_the_worker_gets_no_secret_but_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://:password@127.0.0.1:1/0"
    for name in ("MTA_SECRET", "MTA_ENGINE_KEY"):
        monkeypatch.setenv(name, "e" * 32)
    settings = Settings(secret="s" * 32, engine_key="k" * 32, bank=tmp_path, redis_url=url)  # type: ignore[arg-type]
    part = worker_part(settings, tmp_path / "worker.log")
    assert not {"MTA_SECRET", "MTA_ENGINE_KEY"} & part.environment.keys()
    assert (part.environment["MTA_BANK"], part.environment["MTA_REDIS_URL"]) == (str(tmp_path), url)
    assert not {"s" * 32, "k" * 32, "e" * 32} & set(part.environment.values())


def test_a_taken_port_is_refused_by_number() -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StartError, match=f"127.0.0.1:{port}: Address already in use"):
            check_port(port)
    check_port(port)
