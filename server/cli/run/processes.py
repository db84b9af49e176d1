"""`mta up` runs all parts; `mta engine`, `mta router` and `mta worker` are one each; `mta models` prepares them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from bank.models.process_startup import heavy_imports
from server.cli.shared import Bank, Embedder, Model, RedisUrl, end_on_signals, prepare_to_train, setting
from server.observability.logs import log_to_stderr
from server.settings import load_settings

Host = Annotated[str | None, setting("inner_host", "--host")]


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


def models(
    bank: Bank = None,
    model: Model = None,
    embedder: Embedder = None,
    cache_dir: Annotated[Path | None, setting("cache_dir")] = None,
    *,
    needs: Annotated[
        bool, typer.Option("--needs", help="Only print what the base model needs; no weights are fetched.")
    ] = False,
) -> None:
    """Prepare the base model, the embedder and, with vLLM for CPUs, the CPU kernel, and print their paths.

    Other commands do so on first use, if the folder is writable. A hub id is fetched at the bank's revision, if any.
    """
    settings = load_settings(bank=bank, model=model, embedder=embedder, cache_dir=cache_dir)
    if needs:
        from server.cli.run.needs import needs_table

        for what, size in needs_table(settings):
            typer.echo(f"{what:<44}{size:>16}")
        return
    from bank.manifest import MANIFEST_FILE, read_manifest
    from bank.models.folders import ensure_base_model, ensure_embedder
    from server.engine.command import is_cpu_build
    from server.engine.cpu import native

    cache, folder = settings.cache_dir, settings.bank
    built_for = read_manifest(folder).base_model if folder and (folder / MANIFEST_FILE).exists() else None
    preparations: dict[str, Callable[[], Path | None]] = {
        "base model": lambda: ensure_base_model(settings.model, cache, built_for, settings.chat_template),
        "embedder": lambda: ensure_embedder(settings.embedder, cache),
    }
    if is_cpu_build():
        preparations["CPU kernel"] = lambda: native.library_path(cache) if native.build(cache) else None
    for what, prepare in preparations.items():
        typer.echo(f"preparing the {what} …", err=True)  # stdout has only the paths
        if path := prepare():
            typer.echo(f"{what:<12}{path}")


def engine(
    bank: Bank = None,
    model: Model = None,
    inner_host: Host = None,
    engine_port: Annotated[int | None, setting("engine_port", "--port")] = None,
) -> None:
    """Start the engine: check the bank and the model, then become the vLLM process.

    All other options are settings (`mta settings`); the key comes from MTA_ENGINE_KEY.
    """
    settings = load_settings(**locals())
    from server.engine.command import check_engine, engine_command

    log_to_stderr(settings.log_format)
    argv, environment = engine_command(settings, *check_engine(settings))
    os.execve(argv[0], argv, environment)


def router(
    engine_urls: Annotated[str | None, setting("engine_urls")] = None,
    inner_host: Host = None,
    router_port: Annotated[int | None, setting("router_port", "--port")] = None,
) -> None:
    """Start the router: become the vllm-router process, which sends the same recipe to the same engine.

    The router has no key of its own; it passes the gateway's key on. Never expose its port to the outside.
    """
    settings = load_settings(**locals())
    from server.supervisor.services import router_command

    argv, environment = router_command(settings)
    if os.getpid() == 1 and (child := os.fork()):  # the kernel keeps signals from process 1 that has no handler yet
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(child, number))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    os.execve(argv[0], argv, environment)


def worker(
    bank: Bank = None,
    model: Model = None,
    redis_url: RedisUrl = None,
    worker_threads: Annotated[int | None, setting("worker_threads", "--threads")] = None,
) -> None:
    """Train user adapters, one job at a time, until stopped. You can run any number of workers."""
    settings = load_settings(**locals())
    end_on_signals()
    prepare_to_train(settings.worker_threads, gpu=settings.worker_gpu_share != 0)
    log_to_stderr(settings.log_format)

    with heavy_imports():
        from server.worker.process import run_worker  # torch reads the number of threads on import

    asyncio.run(run_worker(settings))


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
