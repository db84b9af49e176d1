"""Log lines as text or JSON, with the ids of the current request and trace."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

VLLM_CONFIG = Path(__file__).with_name("vllm_logging.json")  # makes an engine log with `JsonFormatter`
request_id: ContextVar[str] = ContextVar("mta_request_id", default="")
traceparent: ContextVar[str] = ContextVar("mta_traceparent", default="")  # W3C's header; empty if not traced


def log_to_stderr(log_format: Literal["text", "json"]) -> None:
    """Log our own loggers from INFO up, all others from WARNING up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("mta").setLevel(logging.INFO)


def _ids() -> dict[str, str]:
    ids = {"request": request_id.get(), "trace": traceparent.get()[3:35]}  # behind the version
    return {name: value for name, value in ids.items() if value}


class TextFormatter(logging.Formatter):
    """Formats time, level, logger and message, then the ids that the message does not contain."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s%(ids)s")

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        record.ids = "".join(f" {name}={value}" for name, value in _ids().items() if value not in message)
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Formats one object per line, with `request` and `trace` if known, and the fields of `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _ids() | getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class RequestIds:
    """ASGI middleware for engines that adds the ids sent by the gateway to the log lines of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"x-request-id":
                request_id.set(value.decode("latin-1"))
            elif name == b"traceparent":
                traceparent.set(value.decode("latin-1"))
        await self._app(scope, receive, send)
