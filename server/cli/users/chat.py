"""`mta chat`: a conversation in the terminal, as one of the users."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import MtaError

if TYPE_CHECKING:
    from mta_client import Client

COMMANDS = {
    "/base": "the base model answers",
    "/me": "your own adapter answers",
    "/strength X": "how much the anchors say, 0 to 1 in steps of 0.05",
    "/new": "begin a new conversation",
    "/quit": "leave; so does Ctrl-D",
}
# An answer must not control the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    user: Annotated[str, typer.Option(help="Whose adapter answers.")],
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
) -> None:
    """Talk to the server as one of its users; Ctrl-C stops an answer."""
    import mta_client
    from server.cli.users.patience import client_of

    with client_of(url) as client, ExitStack() as after:
        try:
            client.health()
        except mta_client.MtaError as error:
            raise MtaError(f"no gateway at {url}: {error}. Start one with `mta up`, or name it by --url") from error
        after.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing
        _note("/base, /me, /strength X, /new, /quit; Ctrl-C stops an answer")
        Conversation(client, user, max_tokens).run()


class Conversation:
    """The messages so far, and who answers next. Ctrl-C drops the line that is being typed, or stops the answer."""

    def __init__(self, client: Client, user: str, max_tokens: int) -> None:
        self._client = client
        self._user = user
        self._messages: list[dict[str, str]] = []
        self._options: dict[str, Any] = {"personalize": "auto", "strength": 1.0, "max_tokens": max_tokens}
        self._interrupted = False

    def run(self) -> None:
        """Read lines until the last one."""
        while True:
            line = None
            try:
                with self._ended_by_ctrl_c():
                    line = input(self._prompt).strip()
            except EOFError:
                typer.echo()
                return
            if line is None:
                typer.echo()
            elif line == "/quit":
                return
            elif line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    @contextmanager
    def _ended_by_ctrl_c(self) -> Iterator[None]:
        """Ctrl-C ends the block, and is ignored after it."""
        self._interrupted = False
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, self._interrupt)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True  # an exception raised in a callback of the interpreter is lost
        raise KeyboardInterrupt

    @property
    def _prompt(self) -> str:
        """The text before a question: it names who will answer."""
        if self._options["personalize"] == "none":
            return "base> "
        return f"{self._user} {self._options['strength']:g}> " if self._options["strength"] < 1 else f"{self._user}> "

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name == "/base":
            self._options["personalize"] = "none"
        elif name == "/me":
            self._options["personalize"] = "auto"
        elif name == "/new":
            self._messages.clear()
        elif name == "/strength" and re.fullmatch(r"-?\d*\.?\d+", value):
            self._options["strength"] = float(value)
        else:
            _note("\n".join(f"{command:<12} {what}" for command, what in COMMANDS.items()))

    def _ask(self, question: str) -> None:
        """Print the answer as it comes, and who gave it; the text of a stopped answer stays in the conversation."""
        import mta_client
        from server.cli.users.patience import reason_of

        messages = [*self._messages, {"role": "user", "content": question}]
        text, level, end, first_s, begun_s = "", "", "stopped", None, time.monotonic()
        try:
            chunks = self._client.stream(self._user, messages, **self._options)
            with self._ended_by_ctrl_c(), closing(chunks):
                for chunk in chunks:
                    if who := chunk.personalization:
                        reasons = "; ".join(filter(None, (who.reason, who.history_reason)))
                        level = f"{who.level} ({reasons})" if reasons else who.level
                    first_s = first_s or (time.monotonic() if chunk.text else None)
                    text += chunk.text
                    typer.echo(chunk.text.translate(_CONTROLS), nl=False)
                    if chunk.usage:
                        end = f"{chunk.usage['completion_tokens']} tokens"
                    if self._interrupted:
                        break
        except mta_client.MtaError as error:
            typer.secho(f"{chr(10) if text else ''}error: {reason_of(error)}", fg=typer.colors.RED)
            return
        typer.echo()
        first = "no token" if first_s is None else f"first token after {(first_s - begun_s) * 1000:.0f} ms"
        _note(", ".join(filter(None, (level, first, end))))
        if text:
            self._messages = [*messages, {"role": "assistant", "content": text}]


def _note(text: str) -> None:
    typer.secho(text, dim=True)
