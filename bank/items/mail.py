"""A person's mails: what they wrote themselves in each, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import parseaddr

from bank.items.own_words import own_words, without_quotes
from bank.items.tasks import Task

MAX_MAIL_BYTES = 32 << 20  # of a mail with its attachments
MAX_LINES = 2000  # of its text; who writes is no faster than who searches it for quotes
QUOTED = 1000  # characters of the mail that another answers, at most
NO_SUBJECT = "no subject"
NO_WORDS = "holds no words of its writer: quotes, markup or code alone, or too few letters"
_SIGNATURE = re.compile(r"^-- ?$.*", re.MULTILINE | re.DOTALL)  # RFC 3676; a name below a greeting is the person's own
_ANSWERS = re.compile(r"^(\s*(re|aw|sv|fwd?|wg)\s*:)+\s*", re.IGNORECASE)
_BREAKS = "br", "p", "div", "li", "tr", "blockquote", "h1", "h2", "h3"


class UnusableError(ValueError):
    """A mail or a file is left out; the message says why."""


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail as its sender wrote it."""

    sender: str  # address in lower case
    sent: float  # seconds since 1970; 0 if the mail does not say
    subject: str
    words: str
    quoted: str  # the beginning of the mail that it answers, or nothing

    def item(self, task: Task) -> dict[str, str]:
        """Return the mail as an item: what was asked and what was answered, or in a bank of labels its text."""
        if not task.mail:
            return {"text": self.words}
        turn = (task.reply if self.quoted else task.mail).format(subject=self.subject, quoted=self.quoted)
        return {"input": turn, "output": self.words}


def read_mail(raw: bytes) -> Mail:
    """Parse a mail; UnusableError if it is none, too large, or holds no words of its sender."""
    if len(raw) > MAX_MAIL_BYTES:
        raise UnusableError(f"is larger than {MAX_MAIL_BYTES >> 20} MiB")
    try:
        message = BytesParser(policy=policy.default).parsebytes(raw)
        assert isinstance(message, EmailMessage)
        sender = parseaddr(str(message["from"] or ""))[1].lower()
        subject = _ANSWERS.sub("", " ".join(str(message["subject"] or "").split())) or NO_SUBJECT
        date = message["date"] and message["date"].datetime
        sent = date.timestamp() if date else 0.0
        own, quoted = _parts(message)
    except UnusableError:
        raise
    except Exception as error:  # its parser fails in many ways on what is no mail
        raise UnusableError(f"cannot be read as a mail: {error!r}") from error
    if not sender:
        raise UnusableError("names no sender")
    words = own_words("\n".join(own))
    if not words:
        raise UnusableError(NO_WORDS)
    return Mail(sender, sent, subject, words, without_quotes(quoted)[:QUOTED].strip())


def own_address(person: str, senders: Collection[str]) -> str:
    """Return whose mails are a person's: the address that they are named by, or the only one; "" if there are many."""
    return person.lower() if "@" in person else "".join(senders) if len(senders) == 1 else ""


def _parts(message: EmailMessage) -> tuple[list[str], str]:
    """Return what the sender wrote above and below a quoted mail, and the mail."""
    import quotequail

    body = message.get_body(("plain", "html"))
    if body is None:
        raise UnusableError("has no text")
    text = body.get_content().replace("\r\n", "\n")
    if text.count("\n") > MAX_LINES:
        raise UnusableError(f"has over {MAX_LINES} lines")
    if body.get_content_subtype() == "html":
        parts = quotequail.unwrap_html(text) or {"html_top": text}
        top, quoted, bottom = (_plain(parts.get(name, "")) for name in ("html_top", "html", "html_bottom"))
    else:
        parts = quotequail.unwrap(text) or {"text_top": text}
        top, quoted, bottom = (parts.get(name, "") for name in ("text_top", "text", "text_bottom"))
    forwarded = parts.get("type") == "forward"
    own = [top] if forwarded else [top, bottom]
    return [_SIGNATURE.sub("", part) for part in own], "" if forwarded else quoted


def _plain(html: str) -> str:
    """Return the text of an HTML mail, with its line breaks."""
    from lxml.html import HTMLParser, document_fromstring

    if not html.strip():
        return ""
    tree = document_fromstring(html.encode(), HTMLParser(encoding="utf-8"))
    for element in list(tree.iter("style", "script", "head")):
        element.drop_tree()
    for element in tree.iter(*_BREAKS):
        element.tail = "\n" + (element.tail or "")
    return str(tree.text_content())
