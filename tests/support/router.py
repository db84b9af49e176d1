"""The router in front of several engines, started as `mta router` starts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.rig.processes import Background, answers, running, wait_until
from server.settings import Settings
from server.supervisor.services import LIVENESS, free_port, router_command


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    process: Background  # with its log
    url: str  # its HTTP address
    port: int  # the port of that address
    metrics_url: str  # the address of its metrics


@contextmanager
def running_router(engines: Sequence[str], port: int | None = None) -> Iterator[Router]:
    """Run a router in front of these engines; wait until it listens, which needs one engine that answers."""
    port, metrics_port = port or free_port(), free_port()
    settings = Settings(engine_urls=",".join(engines), router_port=port, metrics_port=metrics_port)
    argv, environment = router_command(settings)
    with running(argv, environment) as process:
        router = Router(process, f"http://127.0.0.1:{port}", port, f"http://127.0.0.1:{metrics_port}/metrics")
        wait_until(lambda: _listens(router), "the router to listen")
        yield router


def _listens(router: Router) -> bool:
    assert router.process.process.poll() is None, router.process.output
    return answers(router.url + LIVENESS)
