"""`mta chat`: a conversation in the terminal, as one of the users."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError

if TYPE_CHECKING:
    from mta_client import Client, Personalization

COMMANDS = {
    "/base": "the base model answers",
    "/me": "your own adapter answers",
    "/strength X": "how much the anchors say, 0 to 1 in steps of 0.05",
    "/new": "begin a new conversation",
    "/quit": "leave; so does Ctrl-D",
}
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a text may not do to a terminal."""


def chat(
    user: Annotated[str, typer.Option(help="Whose adapter answers.")],
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
) -> None:
    """Talk to the server as one of its users; Ctrl-C stops an answer."""
    try:
        from mta_client import Client
        from mta_client import MtaError as ClientError
    except ImportError as error:
        raise MtaError(f"{error}: the extra `client` of this package brings what `mta chat` needs") from error
    with Client(url) as client:
        try:
            client.health()
        except ClientError as error:
            raise MtaError(
                f"no gateway at {url}: {error.message}. Start one with `mta up`, or name it by --url"
            ) from error
        _talk(Conversation(client, user, max_tokens))


class Conversation:
    """What was said so far, and who is to answer next.

    Args:
        client: of the gateway.
        user: who asks.
        max_tokens: most tokens of an answer.
    """

    def __init__(self, client: Client, user: str, max_tokens: int) -> None:
        self._client = client
        self._user = user
        self._max_tokens = max_tokens
        self._messages: list[dict[str, str]] = []
        self._personalize = "auto"
        self._strength = 1.0

    @property
    def prompt(self) -> str:
        """What stands before a question: who will answer it."""
        strength = f" {self._strength:g}" if self._personalize == "auto" and self._strength < 1 else ""
        return f"{self._user if self._personalize == 'auto' else 'base'}{strength}> "

    def command(self, line: str) -> None:
        """Obey a line that begins with a slash."""
        name, _, value = line.partition(" ")
        if name == "/base":
            self._personalize = "none"
        elif name == "/me":
            self._personalize = "auto"
        elif name == "/new":
            self._messages.clear()
        elif name == "/strength" and _is_number(value):
            self._strength = float(value)
        else:
            _note("\n".join(f"{command:<12} {what}" for command, what in COMMANDS.items()))

    def ask(self, question: str) -> None:
        """Print the answer as it comes, and who gave it; what was said of a stopped answer counts as said."""
        from mta_client import MtaError as ClientError

        asked = [*self._messages, {"role": "user", "content": question}]
        who: Personalization | None = None
        first_s: float | None = None
        said, end, begun_s = "", "stopped", time.monotonic()
        answer = self._client.stream(
            self._user,
            asked,
            personalize=self._personalize,
            strength=self._strength,
            max_tokens=self._max_tokens,
        )
        try:
            with closing(answer):
                for chunk in answer:
                    who = who or chunk.personalization
                    if chunk.text:
                        first_s = first_s or time.monotonic()
                        said += chunk.text
                        typer.echo(chunk.text.translate(_CONTROLS), nl=False)
                    if chunk.usage:
                        end = f"{chunk.usage['completion_tokens']} tokens"
        except KeyboardInterrupt:
            pass
        except ClientError as error:
            hint = "; `mta chat` takes it from MTA_API_KEY" if error.status == 401 else ""
            typer.secho(f"{chr(10) if said else ''}error: {error.message}{hint}", fg=typer.colors.RED)
            return
        typer.echo()
        first = "no token" if first_s is None else f"first token after {(first_s - begun_s) * 1000:.0f} ms"
        _note(", ".join(filter(None, (_level(who), first, end))))
        if said:
            self._messages = [*asked, {"role": "assistant", "content": said}]


def _talk(conversation: Conversation) -> None:
    """Take lines until the last one. At the prompt Ctrl-C drops what was typed."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing

    _note("/base, /me, /strength X, /new, /quit; Ctrl-C stops an answer")
    while True:
        try:
            line = input(conversation.prompt).strip()
        except KeyboardInterrupt:
            typer.echo()
            continue
        except EOFError:
            typer.echo()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.ask(line)


def _level(who: Personalization | None) -> str:
    if who is None:
        return ""
    return f"{who.level} ({who.reason})" if who.reason else who.level


def _note(text: str) -> None:
    typer.secho(text, dim=True)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
