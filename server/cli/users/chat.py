"""`mta chat` and `mta rewrite`: use the server in the terminal as one of its users."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import MtaError
from server.cli.users.commands import Url, call_gateway

if TYPE_CHECKING:
    from mta_client import Client

COMMANDS = {
    "/base": "use the base model",
    "/me": "use your adapter",
    "/strength X": "strength of the anchors, 0 to 1 in steps of 0.05",
    "/new": "start a new conversation",
    "/quit": "quit (or press Ctrl-D)",
}
# Removed from answers, which must not control the terminal.
_CONTROL_CHARACTERS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    user: Annotated[str, typer.Option(help="The user whose adapter answers.")],
    url: Url = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens in an answer; default: the server's.", min=1)
    ] = None,
) -> None:
    """Talk to the server as one of its users; Ctrl-C stops an answer."""
    import mta_client
    from server.cli.users.gateway import gateway_client

    with gateway_client(url) as client, ExitStack() as after:
        try:
            client.health()
        except mta_client.MtaError as error:
            raise MtaError(f"no gateway at {client.url}: {error}. Start one with `mta up`, or set --url") from error
        after.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing
        _print_note(f"{', '.join(COMMANDS)}; Ctrl-C stops an answer")
        Conversation(client, user, max_tokens).run()


class Conversation:
    """A conversation and the options of its next answer. Ctrl-C discards the typed line or stops the answer."""

    def __init__(self, client: Client, user: str, max_tokens: int | None) -> None:
        self._client = client
        self._user = user
        self._messages: list[dict[str, str]] = []
        self._options: dict[str, Any] = {"personalize": "auto", "strength": 1.0, "max_tokens": max_tokens}

    def run(self) -> None:
        while True:
            line = None
            try:
                with _until_ctrl_c():
                    line = input(self._prompt).strip()
            except EOFError:
                line = "/quit"
                typer.echo()
            if line == "/quit":
                return
            if line is None:
                typer.echo()
            elif line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    @property
    def _prompt(self) -> str:
        if self._options["personalize"] == "none":
            return "base> "
        strength = self._options["strength"]
        return f"{self._user} {strength:g}> " if strength < 1 else f"{self._user}> "

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
            _print_note("\n".join((f"{line} is none of:", *(f"{name:<12} {what}" for name, what in COMMANDS.items()))))

    def _ask(self, question: str) -> None:
        """Stream the answer and print its personalization. The text of a stopped answer stays in the conversation."""
        import mta_client
        from server.cli.users.gateway import describe_error

        messages = [*self._messages, {"role": "user", "content": question}]
        text, level, end, first, start_s = "", "", "stopped", "no token", time.monotonic()
        try:
            chunks = self._client.stream(self._user, messages, **self._options)
            with _until_ctrl_c(), closing(chunks):
                for chunk in chunks:
                    if who := chunk.personalization:
                        reasons = "; ".join(filter(None, (who.reason, who.history_reason)))
                        level = f"{who.level} ({reasons})" if reasons else who.level
                    if chunk.text and not text:
                        first = f"first token after {(time.monotonic() - start_s) * 1000:.0f} ms"
                    text += chunk.text
                    typer.echo(chunk.text.translate(_CONTROL_CHARACTERS), nl=False)
                    if chunk.usage:
                        own = f", {chunk.moved} from the user's own words" if chunk.moved else ""
                        end = f"{chunk.usage['completion_tokens']} tokens{own}"
        except mta_client.MtaError as error:
            typer.secho(f"{chr(10) if text else ''}error: {describe_error(error)}", fg=typer.colors.RED)
            return
        typer.echo()
        _print_note(", ".join(filter(None, (level, first, end))))
        if text:
            self._messages = [*messages, {"role": "assistant", "content": text}]


def rewrite(
    user: Annotated[str, typer.Option(help="The user whose words the draft gets.")],
    draft: Annotated[typer.FileText, typer.Argument(help="File with the draft.", show_default="standard input")] = "-",  # type: ignore[assignment]
    url: Url = None,
) -> None:
    """Give a draft back in a user's own words; which facts it keeps follows on standard error."""
    made = call_gateway(url, lambda client: client.rewrite(user, draft.read()))
    typer.echo(made.text.translate(_CONTROL_CHARACTERS))
    facts = [f"{made.personalization.level}", *(f"{count} {kind} kept" for kind, count in made.kept.items())]
    changed = {"missing": made.missing, "added": made.added}
    facts += [f"{name}: {', '.join(values)}" for name, values in changed.items() if values]
    typer.secho("; ".join(facts), dim=True, err=True)


@contextmanager
def _until_ctrl_c() -> Iterator[None]:
    """End the block on Ctrl-C; ignore Ctrl-C after the block."""
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _print_note(text: str) -> None:
    typer.secho(text, dim=True)
