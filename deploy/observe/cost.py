"""`python -m deploy.observe.cost`: measure the CPU time of observability per request, in microseconds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from io import StringIO
from typing import Any

from server.gateway.operating.metrics import Metrics, RequestLog
from server.watching.logs import JsonFormatter, TextFormatter
from server.watching.tracing import Tracing

ROUNDS, TURNS = 20_000, 5
STAGES = {"profile": 0.9, "recipe": 0.1, "engine_ttft": 31.0, "engine": 480.0, "total": 482.0}
USAGE = {"prompt_tokens": 400, "completion_tokens": 100}


def spent_us(what: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the CPU time of one call: the best of five turns, which is the least disturbed one."""
    turns = []
    for _ in range(TURNS):
        start_ns = time.thread_time_ns()
        for _ in range(rounds // TURNS):
            what()
        turns.append((time.thread_time_ns() - start_ns) / (rounds // TURNS) / 1000)
    return min(turns)


def request_us(log_format: logging.Formatter, tracing: Tracing) -> float:
    """Return the time of the outermost middleware for a request, without the inner app."""
    handler = logging.StreamHandler(StringIO())
    handler.setFormatter(log_format)
    log = logging.getLogger("mta.gateway")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        pass

    watched = RequestLog(answer, Metrics({"default"}), tracing)

    def run(app: Any) -> float:
        scope = {"type": "http", "method": "POST", "path": "/generate"}
        return spent_us(lambda: loop.run_until_complete(app(dict(scope), None, send)))

    loop = asyncio.new_event_loop()
    try:
        return run(watched) - run(answer)
    finally:
        loop.close()


def main() -> None:
    """Print a table."""
    metrics = Metrics({"default"})
    rows = {
        "request: its id, its count, its line as text": request_us(TextFormatter(), Tracing()),
        "request: the same, its line as JSON": request_us(JsonFormatter(), Tracing()),
        "generation: stages, tokens": spent_us(lambda: metrics.observe(STAGES, "merged", USAGE)),
        "generation: first token": spent_us(lambda: metrics.ttft.labels("merged").observe(0.03)),
        "each call to the store": spent_us(lambda: metrics.store("command", 0.001, False)),
        "each token of a stream": spent_us(lambda: metrics.inter_token.observe(0.005)),
        "a look at the metrics": spent_us(metrics.text, rounds=100),
    }
    for what, microseconds in rows.items():
        print(f"{what:48}{microseconds:8.1f} us")


if __name__ == "__main__":
    main()
