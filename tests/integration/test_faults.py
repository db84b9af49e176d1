"""What happens when parts of `mta up` die: real processes, killed the hard way."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bench.rig.processes import alive, children, command_line, descendants, wait_until
from bench.rig.up import Up, up

PROFILE = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
CONTEXT = 16_384
LONG = {"user_id": "ada", "prompt": "Hello", "max_tokens": CONTEXT - 100, "temperature": 0, "stream": True}
SHORT = {"user_id": "ada", "prompt": "Hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, embedder_folder: Path) -> Iterator[Up]:
    """`mta up` with all three parts real, on a tiny model that can go on for long. Tests leave it ready."""
    from bench.rig.tiny import tiny_bank, tiny_model

    folder = tmp_path_factory.mktemp("machine")
    model = tiny_model(folder / "model", context=CONTEXT)
    bank = tiny_bank(folder / "bank", model, embedder_folder, anchors=6)
    options = ("--bank", str(bank), "--model", str(model), "--dtype", "float32")
    with up(folder / "data", *options, environment={"MTA_EMBEDDER": str(embedder_folder)}) as started:
        with started.client() as client:
            client.put("/users/ada/profile", json=PROFILE).raise_for_status()
        yield started


def _server(machine: Up) -> int:
    pid = machine.part("engine")
    assert pid
    return pid


def _core(machine: Up) -> int:
    return next(pid for pid in children(_server(machine)) if "EngineCore" in command_line(pid))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [_server, _core])
def test_an_engine_killed_in_mid_stream_comes_back(machine: Up, victim: Callable[[Up], int]) -> None:
    gateway, restarts = machine.part("gateway"), machine.process.output.count("engine   ready")
    family, doomed = descendants(_server(machine)), victim(machine)
    with machine.client() as client:
        with client.stream("POST", "/generate", json=LONG) as response:
            lines = response.iter_lines()
            assert "personalization" in next(lines)
            os.kill(doomed, signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert "[DONE]" not in events
        assert "error" in json.loads(events[-1])
        wait_until(lambda: client.get("/ready").status_code == 503, "/ready to turn 503")
        refused = client.post("/generate", json=SHORT)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "service_unavailable"
        wait_until(lambda: machine.process.output.count("engine   ready") > restarts, "the engine's restart", 240)
        wait_until(machine.ready, "/ready to turn 200")
        answer = client.post("/generate", json=SHORT)
        assert answer.status_code == 200, answer.text
        assert answer.json()["personalization"]["level"] == "merged"
    assert machine.part("gateway") == gateway
    assert [pid for pid in family if alive(pid)] == []


def test_every_socket_of_every_part_is_on_the_loopback_address(machine: Up) -> None:
    found = {socket for pid in descendants(machine.pid) for socket in listening(pid)}
    assert len(found) >= 3
    assert {address for address, _ in found} == {"127.0.0.1"}


def listening(pid: int) -> set[tuple[str, int]]:
    """Return address and port of all TCP sockets that a process listens on; IPv6 addresses in the kernel's notation."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            kind, _, inode = str(handle.readlink()).partition(":")
            if kind == "socket":
                inodes.add(inode.strip("[]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text("ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: listening
                address, port = fields[1].split(":")
                readable = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address
                found.add((readable, int(port, 16)))
    return found
