"""Measure overload of two gateways: many concurrent streams, twice the capacity, and slow readers.

    streams   500 clients that stream all the time: no stream may be lost
    overload  the engine's capacity, then random arrivals at that rate and at twice that rate: the excess is refused,
              and the other requests take little longer
    readers   random arrivals at half of the capacity: alone, and beside clients of long answers that read a few bytes
              per second or nothing, which must hardly slow down the others

The engine is real; its model is tiny, which maximises the gateways' load. Exit status 1 if a claim fails.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from bench import script
from bench.fleet.capacity import PLACES, SEND_TIMEOUT_S, USERS, OnStream, Overload, Rows
from bench.fleet.streams import Load, Stream
from bench.page.report import console, report
from bench.rig.engine import KEY
from bench.rig.processes import wait_until
from bench.rig.servers import vllm_server
from bench.rig.subject import Subject, tiny
from bench.rig.tiny import world
from bench.rig.up import gateway_url, running_gateway
from bench.rig.valkey import ValkeyProcess
from bench.serving.front import SECRET
from mta_client import Client

PARTS = ("streams", "overload", "readers")
GATEWAYS = 2


def main(
    *,
    part: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; may be repeated.", show_default="all")
    ] = None,
    streams: Annotated[int, typer.Option(help="Concurrent streaming clients.", min=1)] = 500,
    seconds: Annotated[float, typer.Option(help="Seconds of concurrent streaming.", min=1)] = 180,
    phase: Annotated[float, typer.Option(help="Seconds of each other measurement.", min=1)] = 60,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure two gateways with more requests than their engine can serve."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    rows: Rows = []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console()) as progress:
        subject = tiny(Path(scratch))
        bar = _Bar(progress)
        records: dict[str, Load] = {}
        if "streams" in chosen:
            with _fleet(subject, Path(scratch) / "streams", streams) as urls:
                rows += asyncio.run(Overload(urls, tokens, bar, records).streams(streams, seconds))
        if set(chosen) - {"streams"}:
            with _fleet(subject, Path(scratch) / "overload", PLACES) as urls:
                rows += asyncio.run(Overload(urls, tokens, bar, records).beyond(chosen, phase))
    title = f"Overload: {GATEWAYS} gateways, one engine, {subject.title}, answers of {tokens} tokens"
    report(title, rows, out, **{what: _summary(load) for what, load in records.items()})


class _Bar:
    """A progress bar for each measurement that counts its streams."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, what: str) -> OnStream:
        task = self._progress.add_task(what, total=None)

        def on_stream(stream: Stream) -> None:
            self._progress.advance(task)
            self._progress.update(task, description=f"{what}: {self._progress.tasks[task].completed:.0f}")

        return on_stream


@contextmanager
def _fleet(subject: Subject, folder: Path, sequences: int) -> Iterator[list[str]]:
    """Run gateways with an engine for `sequences` and a store with the users; yield the gateways' URLs."""
    folder.mkdir()
    with (
        ValkeyProcess(folder / "valkey") as store,
        vllm_server(subject, max_num_seqs=sequences, max_loras=USERS) as server,
        ExitStack() as stack,
    ):
        gateways = [
            stack.enter_context(
                running_gateway(
                    subject.bank,
                    store.url,
                    server.url,
                    KEY,
                    SECRET,
                    send_timeout_s=SEND_TIMEOUT_S,
                    engine_places=-(-sequences // GATEWAYS),  # users share recipes: there are fewer slots
                )
            )
            for _ in range(GATEWAYS)
        ]
        urls = [gateway_url(gateway) for gateway in gateways]
        for url in urls:
            with Client(url) as client:
                wait_until(client.ready, f"{url} to be ready")
        with Client(urls[0]) as client:
            for user in range(USERS):
                client.put_profile(f"user-{user}", [world(user)])
        yield urls


def _summary(load: Load) -> dict[str, Any]:
    """Summarise a load for the JSON file."""
    return {
        "seconds": load.seconds,
        "refused": load.refused,
        "failures": load.failures,
        "served": [asdict(stream) for stream in load.served[:5000]],
    }


if __name__ == "__main__":
    script(main)
