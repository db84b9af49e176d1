"""The store as compose and Kubernetes start it, with a server's own program: what it is told, and what probes find."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import yaml

from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from tests.support.containers import ROOT

# 20 ms for each key, and heed to whoever asks meanwhile
SLOW_TO_LOAD = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")


@dataclass(frozen=True)
class Shipped:
    """The store of a deployment: its command, its container's limit in GiB, and the commands that probe it."""

    command: list[str]
    limit_gib: int
    probes: list[list[str]]


def _of_compose() -> Shipped:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["redis"]
    limit_gib = int(service["mem_limit"].removesuffix("g"))
    return Shipped(service["command"], limit_gib, [service["healthcheck"]["test"][1:]])


def _of_pods() -> Shipped:
    documents = yaml.safe_load_all((ROOT / "deploy/k8s/base/valkey.yaml").read_text("utf-8"))
    pod = next(one["spec"]["template"]["spec"] for one in documents if one["kind"] == "StatefulSet")
    [container] = pod["containers"]
    probes = [container[kind]["exec"]["command"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
    return Shipped(container["command"], int(container["resources"]["limits"]["memory"].removesuffix("Gi")), probes)


STORES = pytest.mark.parametrize("shipped", [_of_compose(), _of_pods()], ids=["compose", "pods"])


@STORES
def test_store_has_room_to_fork_and_logs_no_command_contents(shipped: Shipped, tmp_path: Path) -> None:
    options = shipped.command[1:]
    for own in ("--dir", "--port"):
        del options[(place := options.index(own)) : place + 2]
    with ValkeyProcess(tmp_path, options) as server, redis.Redis.from_url(server.url) as raw:
        memory = raw.info("memory")
        assert 0 < 2 * memory["maxmemory"] <= shipped.limit_gib << 30
        assert memory["maxmemory_policy"] == "noeviction"
        raw.config_set("slowlog-log-slower-than", 0)
        raw.set("large", "x" * (2 << 20))
        raw.get("large")
        assert raw.slowlog_len() == 0
        for kind in ("slow", "large-request", "large-reply"):
            assert (kind, raw.execute_command("COMMANDLOG LEN", kind)) == (kind, 0)


@STORES
def test_probes_pass_once_store_answers_and_fail_at_loading(shipped: Shipped, tmp_path: Path) -> None:
    if not shutil.which("valkey-cli"):
        pytest.skip("valkey-cli, which probes the store, is not installed (Debian: valkey-tools)")
    server = ValkeyProcess(tmp_path, DURABLE).start()

    def answers() -> list[int]:
        commands = [[str(server.port) if word == "6379" else word for word in probe] for probe in shipped.probes]
        return [subprocess.run(command, capture_output=True, check=False).returncode for command in commands]

    well = [0] * len(shipped.probes)
    try:
        assert answers() == well
        with redis.Redis.from_url(server.url) as raw:
            raw.mset({f"key-{number}": "x" * 200 for number in range(800)})
            raw.bgrewriteaof()  # the delay is one of its base file's
            wait_until(lambda: raw.info("persistence")["aof_rewrites"] == 1, "the file to be rewritten")
            wait_until(lambda: not raw.info("persistence")["aof_rewrite_in_progress"], "the file to be rewritten")
        server.kill()
        assert 0 not in answers()
        loading = ValkeyProcess(tmp_path, (*DURABLE, *SLOW_TO_LOAD))
        loading.port = server.port
        loading.begin()
        server = loading
        wait_until(lambda: _says(server, "LOADING"), "it to load")
        assert 0 not in answers()
        assert _says(server, "LOADING")
    finally:
        server.kill()


def _says(server: ValkeyProcess, error: str) -> bool:
    command = ["valkey-cli", "-p", str(server.port), "ping"]
    return error in subprocess.run(command, capture_output=True, text=True, check=False).stdout
