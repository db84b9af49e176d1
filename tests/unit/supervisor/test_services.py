"""What `mta up` keeps and starts: its data folder, a durable Valkey, the secrets of each part, the time to end them."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path

import pytest
import redis.asyncio

from bank.errors import BankError
from bench.rig.processes import PATIENCE_S, command_line, descendants
from server.cli.run.machine import parts_of
from server.settings import Settings
from server.supervisor import services
from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.supervisor import end, spawn


def test_data_folder_has_one_process_and_one_lasting_secret(tmp_path: Path) -> None:
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


async def test_valkey_is_durable_and_bounded_and_hides_its_password(tmp_path: Path) -> None:
    data = DataFolder.open(tmp_path / 'a "quoted" folder')
    (data.path / "valkey/temp-rewriteaof-7.aof").write_text("words of somebody who is erased")
    part, url = services.valkey_part(data, 100 << 20), services.valkey_url(data.path)
    assert url
    password = url.split(":")[2].split("@")[0]
    assert stat.S_IMODE(Path(part.command[1]).stat().st_mode) == 0o600
    process = await spawn(part, data, PATIENCE_S)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await part.is_ready(data.log("valkey")):
                assert process.returncode is None, data.log("valkey").read_text()
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
        await end(process, PATIENCE_S)
        data.close()
    assert list((data.path / "valkey").glob("appendonlydir/*.aof"))
    assert not list((data.path / "valkey").glob("temp-*"))


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_killed_parts_end_within_the_documented_time(replicas: int) -> None:
    page = (Path(__file__).parents[3] / "docs/running.md").read_text("utf-8")
    said = re.search(r"all within (\d+) s\s\(with `--replicas`, (\d+) s more for each engine\)", page)
    assert said
    assert int(said[1]) == services.STOP_S
    several = replicas > 1
    parts = 3 + replicas + several  # Valkey, gateway and worker; engines; the router
    assert parts * (services.DRAIN_S + services.STOP_MARGIN_S) < services.STOP_S + int(said[2]) * replicas * several


def test_each_part_gets_its_secrets_and_none_by_argv(
    data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bank_folder: Path,
    tiny_model_folder: Path,
    embedder_folder: Path,
) -> None:
    for name in ("MTA_SECRET", "MTA_ENGINE_KEY", "MTA_API_KEY", "MTA_FIRST_KEY"):
        monkeypatch.setenv(name, "e" * 32)
    monkeypatch.setenv("RUST_LOG", "info")
    url, bank = "redis://:password@127.0.0.1:1/0", tiny_bank_folder
    given = {"secret": "s" * 32, "engine_key": "k" * 32, "bank": bank, "redis_url": url, "profile_items": 7}
    folders = {"model": str(tiny_model_folder), "embedder": embedder_folder}
    engine, other, router, gateway, worker = parts_of(Settings(**given, **folders, replicas=2), data, print)  # type: ignore[arg-type]
    for part in (engine, other, router, gateway, worker):
        assert not {"s" * 32, "k" * 32, "e" * 32} & set(part.command)
    shared = {"MTA_BANK": str(bank), "MTA_REDIS_URL": url, "MTA_PROFILE_ITEMS": "7"}
    assert gateway.environment.items() >= (shared | {"MTA_SECRET": "s" * 32, "MTA_ENGINE_KEY": "k" * 32}).items()
    assert worker.environment.items() >= shared.items()
    assert gateway.environment["MTA_AUDIT"] == str(data.path / "audit.jsonl")
    on_loopback = {"VLLM_API_KEY": "k" * 32, "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert engine.environment.items() >= on_loopback.items()
    for part in (worker, router):  # a worker knows neither users nor engines; a router passes keys on
        assert not {"s" * 32, "k" * 32, "e" * 32} & set(part.environment.values())
    assert "RUST_LOG" not in router.environment  # it would have every recipe logged
    assert router.command[-3:] == ["--worker-urls", f"http://{engine.address}", f"http://{other.address}"]
    assert "--policy=consistent_hash" in router.command
    kept = services.with_engines(Settings(data_dir=data.path))
    assert kept.engines == (f"http://{engine.address}", f"http://{other.address}")
    assert (kept.engine_keys, kept.bank, kept.user_secret) == (("k" * 32,), bank, "e" * 32)
    assert stat.S_IMODE((data.path / services.ENGINES).stat().st_mode) == 0o600
    with pytest.raises(BankError, match="no bank at"):
        parts_of(Settings(bank=data.path, **folders), data, print)  # type: ignore[arg-type]
