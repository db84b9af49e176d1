"""`mta up`: start, watch and stop all parts on this machine."""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

from server.cli.shared import Bank, Model, setting
from server.settings import load_settings


def up(
    *,
    bank: Bank = None,
    model: Model = None,
    port: Annotated[int | None, setting("port", about="Port of the gateway, 0 for a free one.")] = None,
    data_dir: Annotated[Path | None, setting("data_dir", "--data")] = None,
    redis_url: Annotated[str | None, setting("redis_url", about="Use this Redis; do not start Valkey.")] = None,
    engine_url: Annotated[str | None, setting("engine_url", about="Use this engine; do not start vLLM.")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    replicas: Annotated[int | None, setting("replicas")] = None,
    max_loras: Annotated[int | None, setting("max_loras")] = None,
) -> None:
    """Start everything on this machine, keep it running, and stop it all on Ctrl-C.

    The gateway listens on 127.0.0.1 only. All other options are settings (`mta settings`), which every part gets.
    """
    settings = load_settings(**locals())
    from server.cli.run.machine import parts_of
    from server.supervisor.data_folder import DataFolder
    from server.supervisor.services import DRAIN_S, LOOPBACK, STOP_MARGIN_S, free_port, listening
    from server.supervisor.supervisor import Display, Supervisor

    port = settings.port or free_port()
    url = f"http://{LOOPBACK}:{port}"
    drain_s = settings.drain_s if "drain_s" in settings.model_fields_set else DRAIN_S
    changed = {"host": LOOPBACK, "inner_host": LOOPBACK, "port": port, "drain_s": drain_s}
    listening(LOOPBACK, port).close()
    with closing(DataFolder.open(settings.data_dir.expanduser().resolve())) as data, closing(Display()) as display:

        def started() -> None:
            display.close()
            display.say(welcome(url))

        display.say(f"mta up: data and logs in {data.path}\n  checking the bank, the base model and the embedder")
        parts = parts_of(settings.model_copy(update=changed), data, display.say)
        asyncio.run(Supervisor(parts, data, display.report, drain_s + STOP_MARGIN_S).run(started))


def welcome(url: str) -> str:
    """Return the message shown once all is ready, with an Authorization header if the gateway requires a key."""
    import httpx

    keyed = False
    with suppress(httpx.HTTPError):
        keyed = httpx.get(f"{url}/bank", trust_env=False).status_code == httpx.codes.UNAUTHORIZED
    key = ' -H "Authorization: Bearer $MTA_API_KEY"' if keyed else ""
    return (
        f"\nReady: {url} (console: {url}/console, API documentation: {url}/docs). Try\n\n"
        f"  curl -s {url}/generate{key} -H 'Content-Type: application/json' \\\n"
        """    -d '{"user_id": "ada", "prompt": "Write one sentence about rain."}'\n\n"""
        "Ctrl-C stops everything.\n"
    )
