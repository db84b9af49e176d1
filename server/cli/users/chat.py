"""`mta chat`: a conversation in the terminal, as one of the users."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from adapters.errors import MtaError

if TYPE_CHECKING:
    import aiohttp

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
    from server.settings import load_settings

    key = load_settings().api_key
    server = Server(url, key.get_secret_value() if key else None)
    asyncio.run(server.check())
    with Keyboard() as keyboard:
        _talk(Conversation(server, keyboard, user, max_tokens), keyboard)


class Keyboard:
    """What Ctrl-C does: it drops the line that is being typed, stops the answer that is being given, and nothing else.

    An exception would not do for an answer: raised between two tokens, in a callback of the interpreter, it is lost.
    """

    def __init__(self) -> None:
        self.pressed = False
        """Whether it was, since the last line was typed."""
        self._typing = False
        self._answering: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def line(self, prompt: str) -> str | None:
        """What is typed; None if it was dropped.

        Raises:
            EOFError: after the last line.
        """
        self.pressed = False
        try:
            try:
                self._typing = True
                return input(prompt)
            finally:
                self._typing = False
        except KeyboardInterrupt:
            return None

    def run(self, answer: Coroutine[Any, Any, None]) -> None:
        """Run an answer until it ends or is stopped."""
        asyncio.run(self._run(answer))

    async def _run(self, answer: Coroutine[Any, Any, None]) -> None:
        answering = asyncio.create_task(answer)
        self._answering = asyncio.get_running_loop(), answering
        try:
            if self.pressed:
                answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
        finally:
            self._answering = None

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._typing:
            raise KeyboardInterrupt
        if self._answering:
            loop, answer = self._answering
            loop.call_soon_threadsafe(answer.cancel)  # wakes the loop, too


@dataclass(slots=True)
class Said:
    """What has come of an answer.

    Attributes:
        text: of the answer.
        who: the block that says who speaks.
        first_s: when the first text came, by the monotonic clock.
        tokens: how many there are; None before the end.
        error: why there is no more.
    """

    text: str = ""
    who: Mapping[str, Any] = field(default_factory=dict)
    first_s: float | None = None
    tokens: int | None = None
    error: str | None = None

    def take(self, event: Mapping[str, Any]) -> str:
        """Take an event of the stream, and return its text."""
        if "error" in event:
            self.error = event["error"]["message"]
            return ""
        self.who = self.who or event.get("personalization", {})
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        text: str = event["choices"][0]["delta"].get("content", "")
        if text:
            self.first_s = self.first_s or time.monotonic()
            self.text += text
        return text


@dataclass(frozen=True, slots=True)
class Server:
    """A gateway, and the key for it."""

    url: str
    key: str | None

    async def check(self) -> None:
        """See whether it is there.

        Raises:
            MtaError: when it is not.
        """
        import aiohttp

        try:
            async with self._session() as session, session.get(f"{self.url.rstrip('/')}/health") as response:
                response.raise_for_status()
        except (aiohttp.ClientError, OSError) as error:
            raise MtaError(
                f"no gateway at {self.url}: {error}. Start one with `mta up`, or name it by --url"
            ) from error

    async def answer(self, body: Mapping[str, Any], said: Said, keyboard: Keyboard) -> None:
        """Print an answer as it comes; a cancelled one is given up by the engine too."""
        import aiohttp

        from server.cli.users.gateway import reason_of
        from server.gateway.engines.sse import events

        try:
            async with (
                self._session() as session,
                session.post(f"{self.url.rstrip('/')}/generate", json=body) as response,
            ):
                if not response.ok:
                    hint = "; `mta chat` takes it from MTA_API_KEY" if response.status == 401 else ""
                    said.error = reason_of(await response.read(), response.status) + hint
                    return
                async for event in events(response.content):
                    if keyboard.pressed:
                        return
                    typer.echo(said.take(event).translate(_CONTROLS), nl=False)
                    if said.error:
                        return
        except (aiohttp.ClientError, OSError, EOFError) as error:
            said.error = f"{self.url} broke off: {error}"
        except (ValueError, LookupError, TypeError) as error:
            said.error = f"{self.url} does not answer as a gateway does: {error!r}"

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        from server.cli.users.gateway import ANSWER_S

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=ANSWER_S)
        return aiohttp.ClientSession(timeout=timeout, headers=headers)


class Conversation:
    """What was said so far, and who is to answer next.

    Args:
        server: who answers.
        keyboard: stops an answer.
        user: who asks.
        max_tokens: most tokens of an answer.
    """

    def __init__(self, server: Server, keyboard: Keyboard, user: str, max_tokens: int) -> None:
        self._server = server
        self._keyboard = keyboard
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
        asked = [*self._messages, {"role": "user", "content": question}]
        body = {
            "user_id": self._user,
            "messages": asked,
            "personalize": self._personalize,
            "strength": self._strength,
            "max_tokens": self._max_tokens,
            "stream": True,
        }
        said, begun_s = Said(), time.monotonic()
        self._keyboard.run(self._server.answer(body, said, self._keyboard))
        if said.error:
            typer.secho(f"{chr(10) if said.text else ''}error: {said.error}", fg=typer.colors.RED)
            return
        typer.echo()
        first = "no token" if said.first_s is None else f"first token after {(said.first_s - begun_s) * 1000:.0f} ms"
        end = "stopped" if said.tokens is None else f"{said.tokens} tokens"
        _note(", ".join(filter(None, (_level(said.who), first, end))))
        if said.text:
            self._messages = [*asked, {"role": "assistant", "content": said.text}]


def _talk(conversation: Conversation, keyboard: Keyboard) -> None:
    """Take lines until the last one."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing

    _note("/base, /me, /strength X, /new, /quit; Ctrl-C stops an answer")
    while True:
        try:
            line = keyboard.line(conversation.prompt)
        except EOFError:
            typer.echo()
            return
        if line is None:
            typer.echo()
            continue
        line = line.strip()
        if line == "/quit":
            return
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.ask(line)


def _level(who: Mapping[str, Any]) -> str:
    reasons = "; ".join(filter(None, (who.get("reason"), who.get("history_reason"))))
    return f"{who['level']} ({reasons})" if reasons else who.get("level", "")


def _note(text: str) -> None:
    typer.secho(text, dim=True)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
