"""What `mta up` supervises: the data folder, and Valkey, engine and gateway as parts."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path

import pytest
import redis.asyncio

from bench.rig.processes import PATIENCE_S, command_line, descendants
from server.settings import Settings
from server.supervisor import services
from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.services import engine_part, gateway_part, router_part, worker_part
from server.supervisor.supervisor import GRACE_S, GuardedProcess


def test_a_data_folder_has_one_user_at_a_time_and_one_private_secret_for_ever(tmp_path: Path) -> None:
    first = DataFolder.open(tmp_path / "data")
    with pytest.raises(StartError, match=rf"in use by another `mta up` \(process {os.getpid()}\)"):
        DataFolder.open(first.path)
    first.close()
    second = DataFolder.open(first.path)
    second.close()
    assert len(first.secret) == 64 and first.secret == second.secret
    secret = first.path / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    secret.write_text("")
    with pytest.raises(StartError, match="holds no secret"):
        DataFolder.open(first.path)


async def test_valkey_is_durable_and_bounded_asks_for_its_password_and_shows_it_to_nobody(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / 'a "quoted" folder')
    part, url = services.valkey_part(data, 100 << 20), services.valkey_url(data.path)
    assert url
    password = url.split(":")[2].split("@")[0]
    assert stat.S_IMODE(Path(part.command[1]).stat().st_mode) == 0o600
    process = await GuardedProcess.start(part, data)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await part.ready():
                assert process.running, data.log("valkey").read_text()
                await asyncio.sleep(0.05)
        async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
            wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory": str(100 << 20)}
            assert await client.config_get(*wanted) == wanted
            assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            logs = await client.config_get("slowlog-max-len", "commandlog-*-max-len")
            assert len(logs) == 4
            assert set(logs.values()) == {"0"}  # none of them keeps what people wrote
        async with redis.asyncio.Redis.from_url(url.replace(password, "")) as stranger:
            with pytest.raises(redis.AuthenticationError):
                await stranger.ping()
        assert all(password not in command_line(pid) for pid in descendants(os.getpid()))
    finally:
        await process.stop(PATIENCE_S, asyncio.Event())
        data.close()
    assert list((data.path / "valkey").glob("appendonlydir/*.aof"))


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_parts_that_have_to_be_killed_are_gone_in_the_time_that_the_page_says(data: DataFolder, replicas: int) -> None:
    settings = Settings(drain_s=services.DRAIN_S)
    parts = [services.valkey_part(data, 100 << 20), gateway_part(settings), worker_part(settings, data.log("worker"))]
    parts += [engine_part(settings, [], {})] * replicas + [router_part(settings)] * (replicas > 1)
    page = (Path(__file__).parents[3] / "docs/running.md").read_text("utf-8")
    said = re.search(r"all within (\d+) s\s\(with `--replicas`, (\d+) s more for each engine\)", page)
    assert said
    assert int(said[1]) == services.STOP_S
    more_s = int(said[2]) * replicas if replicas > 1 else 0
    assert sum(part.stop_timeout_s + GRACE_S for part in parts) < services.STOP_S + more_s


def test_each_part_gets_the_secrets_that_it_needs_and_none_by_argv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MTA_SECRET", "MTA_ENGINE_KEY", "MTA_API_KEY", "MTA_FIRST_KEY"):
        monkeypatch.setenv(name, "e" * 32)
    monkeypatch.setenv("RUST_LOG", "info")
    url = "redis://:password@127.0.0.1:1/0"
    given = {"secret": "s" * 32, "engine_key": "k" * 32, "bank": tmp_path, "redis_url": url, "profile_items": 7}
    settings = Settings(**given, engine_urls="http://a:1,http://b:2")  # type: ignore[arg-type]
    gateway, worker, router = gateway_part(settings), worker_part(settings, tmp_path / "log"), router_part(settings)
    engine = engine_part(settings, ["vllm"], {"VLLM_API_KEY": "k" * 32})
    for part in (gateway, worker, router, engine):
        assert not {"s" * 32, "k" * 32, "e" * 32} & set(part.command)
    shared = {"MTA_BANK": str(tmp_path), "MTA_REDIS_URL": url, "MTA_PROFILE_ITEMS": "7"}
    assert gateway.environment.items() >= (shared | {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}).items()
    assert worker.environment.items() >= shared.items()
    on_loopback = {"VLLM_API_KEY": "k" * 32, "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert engine.environment.items() >= on_loopback.items()
    for part in (worker, router):  # a worker knows neither users nor engines; a router passes keys on
        assert not {"s" * 32, "k" * 32, "e" * 32} & set(part.environment.values())
    assert "RUST_LOG" not in router.environment  # it would have every recipe logged
    assert router.command[router.command.index("--worker-urls") + 1 :] == ("http://a:1", "http://b:2")
    assert router.command[router.command.index("--policy") + 1] == "consistent_hash"
