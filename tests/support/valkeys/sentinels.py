"""A real Valkey primary, a replica, and Sentinels that watch them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import redis

from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from tests.support.valkeys.clock import ClockedValkey
from tests.support.valkeys.cluster import ask

SERVICE = "users"
DOWN_AFTER_MS = 1000
"""Milliseconds of silence after which a Sentinel considers a server down."""

FAILOVER_TIMEOUT_MS = 2000
_FAST_REPLICATION = ("--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb", "--repl-timeout", "1000000")


class WatchedValkey:
    """A primary and a replica that can swap roles; a majority of Sentinels must agree. `clock` enables `set_clock`."""

    def __init__(
        self, folder: Path, options: Sequence[str] = DURABLE, *, sentinels: int = 1, clock: bool = False
    ) -> None:
        self._folder = folder
        made = ClockedValkey if clock else ValkeyProcess
        self.servers = [made(folder / name, (*options, *_FAST_REPLICATION)) for name in ("first", "second")]
        self.sentinels = [_Sentinel(folder / f"sentinel-{n}") for n in range(sentinels)]
        self.primary, self.replica = self.servers

    @property
    def url(self) -> str:
        """The URL for `MTA_REDIS_URL`."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{each.port}' for each in self.sentinels)}/{SERVICE}"

    def start(self) -> WatchedValkey:
        """Start all, let the second server follow the first, and wait until all Sentinels know each other."""
        try:
            for server in self.servers:
                server.start()
            self.follow()
            for sentinel in self.sentinels:
                sentinel.start()
                sentinel.watch(self.primary.port, len(self.sentinels) // 2 + 1)
            wait_until(lambda: self.knows_all, "the Sentinels to know one another")
        except BaseException:
            self.kill()
            raise
        return self

    def set_clock(self, ahead_s: float) -> None:
        """Set both servers' clocks this far ahead of the machine's."""
        for server in self.servers:
            assert isinstance(server, ClockedValkey)
            server.set_clock(ahead_s)

    def kill(self) -> None:
        """Send SIGKILL to all."""
        for sentinel in self.sentinels:
            sentinel.kill()
        for server in self.servers:
            server.kill()

    def fail_over(self, *, lost: bool) -> None:
        """Promote the replica at once, without waiting for the Sentinels, and let the former primary follow it.

        Args:
            lost: whether the primary dies, so that writes not yet replicated are lost; otherwise it hands over.
        """
        if lost:
            self.primary.kill()
            ask(self.replica, "REPLICAOF", "NO", "ONE")
            self.primary.start()
        else:
            ask(self.primary, "FAILOVER", "TO", "127.0.0.1", self.replica.port)
            wait_until(lambda: ask(self.replica, "ROLE")[0] == b"master", "the replica to take over")
        self.primary, self.replica = self.replica, self.primary
        self.follow()
        for sentinel in self.sentinels:
            sentinel.watch(self.primary.port, len(self.sentinels) // 2 + 1)
        wait_until(lambda: self.knows_all, "the Sentinels to know who is who")

    @property
    def knows_all(self) -> bool:
        """Whether every Sentinel knows the others and a replica that is up."""
        return all(map(self._is_known_to, self.sentinels))

    def follow(self) -> None:
        """Make the replica follow the primary, and wait until it does."""
        ask(self.replica, "REPLICAOF", "127.0.0.1", self.primary.port)
        wait_until(lambda: ask(self.replica, "ROLE")[3] == b"connected", "the replica to follow")

    def _is_known_to(self, sentinel: _Sentinel) -> bool:
        found = ask(sentinel, "SENTINEL SLAVES", SERVICE)
        up = [state for state in found if not state["is_sdown"] and "disconnected" not in state["flags"]]
        others = ask(sentinel, "SENTINEL SENTINELS", SERVICE)
        return len(up) == 1 and len(others) == len(self.sentinels) - 1


class _Sentinel(ValkeyProcess):
    """One Sentinel process."""

    def begin(self) -> list[str]:
        """Start the Sentinel, which writes its state to its configuration file."""
        self.folder.mkdir(parents=True)
        file = self.folder / "sentinel.conf"
        file.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n", "ascii")
        return self.run([str(self.binary), str(file), "--sentinel"])

    def watch(self, primary: int, quorum: int) -> None:
        """Watch the server at a port, and no other."""
        with suppress(redis.ResponseError):  # it watches none yet
            ask(self, "SENTINEL REMOVE", SERVICE)
        ask(self, "SENTINEL MONITOR", SERVICE, "127.0.0.1", primary, quorum)
        for name, value in (("down-after-milliseconds", DOWN_AFTER_MS), ("failover-timeout", FAILOVER_TIMEOUT_MS)):
            ask(self, "SENTINEL SET", SERVICE, name, value)
