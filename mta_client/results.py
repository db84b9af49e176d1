"""The server's answers as frozen dataclasses with the same fields; unknown fields of newer servers are ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


_TRANSIENT = frozenset((408, 429, 502, 503, 504))


class MtaError(Exception):
    """A call that failed.

    Attributes:
        message: what went wrong, for people.
        code: the server's machine-readable reason, or one of the client: `not_sendable` (an argument cannot be sent as
            text, URL or JSON, such as NaN), `no_answer`, `broken_off`, `timed_out` and `not_understood`.
        status: the HTTP status; 0 if nothing was sent, no answer came or a stream broke off.
        param: the invalid field, if there is one.
        retry_after_s: seconds until a retry makes sense, if the server says so.
    """

    def __init__(
        self, message: str, code: str, *, status: int = 0, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, code)  # what unpickling passes again
        self.message, self.code, self.status, self.param = message, code, status, param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})" if self.status else self.message

    @property
    def is_transient(self) -> bool:
        """Return whether the same call may succeed later: the server was busy, or nobody answered."""
        return self.code == "no_answer" or self.status in _TRANSIENT


@dataclass(frozen=True, slots=True)
class Anchor:
    """An anchor in a user's recipe; without a weight, one of the nearest, as in banks whose recipes name none."""

    id: str
    weight: float | None
    similarity: float | None
    gain: float | None


@dataclass(frozen=True, slots=True)
class Personalization:
    """How an answer was personalized: `level` is `base`, `merged` or `stacked`; `reason` says why it is not higher.

    `history` is the number of past items in the prompt; `history_reason` says why it is 0, if some were wanted.
    `arm` is `none` unless the user is compared; `learned` says whether the last message is learnt. Of the
    user's own `phrases`, some had proposed `moved` tokens of the answer.
    """

    level: str
    recipe: str | None
    source: str | None
    anchors: tuple[Anchor, ...]
    history: int
    reason: str | None
    timings_ms: Mapping[str, float]
    history_reason: str | None = None
    arm: str = "none"
    learned: bool = False
    phrases: int = 0
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; `usage` has token counts, or is None if the engine does not report them."""

    id: str
    text: str
    finish_reason: str
    usage: Mapping[str, int] | None
    personalization: Personalization


@dataclass(frozen=True, slots=True)
class Rewritten(Answer):
    """A draft in a user's own words: how many of its facts are `kept`, by kind, and those missing and added."""

    kept: Mapping[str, str]
    missing: Sequence[str]
    added: Sequence[str]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a stream. The first has the personalization, the last the finish reason, token counts and timings.

    The user's own phrases had proposed `moved` of a chunk's tokens; in the last chunk, `moved` is the whole answer's.
    """

    text: str
    finish_reason: str | None
    personalization: Personalization | None
    usage: Mapping[str, int] | None
    timings_ms: Mapping[str, float] | None
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """The result of a profile change: the numbers of received, kept, changed and removed items, and the new recipe.

    `changed` counts items that are new or have new content. `hint` says why some items teach nothing but topics.
    """

    user_id: str
    received: int
    kept: int
    changed: int
    recipe: str
    anchors: tuple[Anchor, ...]
    hint: str | None = None
    removed: int = 0


@dataclass(frozen=True, slots=True)
class User:
    """A user's stored data (`bytes` is its size), the anchors that serve them, and `at`, their point on the map.

    `phrases` is the number of phrases that they repeat, None until their texts have been read.
    `reason` says why what is stored does not personalise answers, if texts are not kept.
    """

    user_id: str
    items: int
    bytes: int
    embedder: str
    updated_at: str
    recipe: str
    source: str
    anchors: tuple[Anchor, ...]
    at: Sequence[float] | None
    phrases: int | None
    adapter: Mapping[str, Any] | None
    keeps_texts: bool = True
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased, and the time by which it is gone from the store's file on disk."""

    user_id: str
    erased: Mapping[str, int]
    log_rewritten_by: str


@dataclass(frozen=True, slots=True)
class Job:
    """A training job's current state; `tries` is the number of times that a worker took it.

    `progress` has `step`, `steps`, `phase`, and pairs of step and loss in `loss` and `held_out`. `shown` has an `input`
    that was held out, the answer `wanted`, and the model's `before` and `after`. `hint` says, of a new job, how many
    samples are not of the bank's task.
    """

    id: str
    state: str
    config: Mapping[str, Any]
    progress: Mapping[str, Any]
    held_out: Mapping[str, float | None]
    created_at: str
    started_at: str | None
    ended_at: str | None
    tries: int
    adapter: str | None
    error: str | None
    shown: Mapping[str, str] | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """All that is known about an answer by now; `learned` says whether this brought a text to learn from.

    `job` is the id of the training job that the text brought, if any."""

    answer: str
    level: str
    arm: str
    outcome: str | None
    rating: str | None
    changed: float | None
    job: str | None
    learned: bool


@dataclass(frozen=True, slots=True)
class Worth:
    """What personalisation is worth: in words (`says`), and the numbers behind it as the server sends them."""

    says: Sequence[str]
    running: Sequence[Mapping[str, Any]]
    comparisons: Sequence[Mapping[str, Any]]
    weeks: Sequence[Mapping[str, Any]]


def read(kind: type[T], answer: Mapping[str, Any]) -> T:
    """Build a value from an answer; raises KeyError or TypeError if the answer has a different shape."""
    wanted = [field for field in fields(kind) if field.name in answer or field.default is MISSING]
    taken = {field.name: answer[field.name] for field in wanted}
    if "anchors" in taken:
        taken["anchors"] = tuple(read(Anchor, anchor) for anchor in taken["anchors"])
    if taken.get("personalization"):
        taken["personalization"] = read(Personalization, taken["personalization"])
    return kind(**taken)


def read_chunk(event: Mapping[str, Any]) -> Chunk:
    choice = event["choices"][0]
    absent = dict.fromkeys(("personalization", "usage", "timings_ms"))
    flat = {"text": choice["delta"].get("content", ""), "finish_reason": choice["finish_reason"]}
    return read(Chunk, absent | dict(event) | flat)
