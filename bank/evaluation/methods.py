"""The methods that are compared, by name: which adapter is used, and how many past items stand in the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from bank.errors import BankError
from bank.items.tasks import AnswerKind, few_and_many

HISTORY = "+history"


class Base(StrEnum):
    """What adapter a method uses.

    prior: no model at all, the person's smoothed histogram of answers. base: no adapter. common: the common row, what
    all share. task: that row trained further, for as long as all anchors took together. mean: all anchors, equal
    weights. random: as many random anchors as topics would pick, equal weights. merged: the bank's own rule. stacked:
    merged, and the user's few-shot adapter. own: the common row and such a few-shot adapter, no anchors.
    """

    PRIOR = "prior"
    BASE = "base"
    COMMON = "common"
    TASK = "task"
    MEAN = "mean"
    RANDOM = "random"
    MERGED = "merged"
    STACKED = "stacked"
    OWN = "own"


SOURCES = ("topic", "evidence", "signature")
"""Where `merged:` and `stacked:` may take weights from, instead of the bank's own rule."""

DEFAULT = "base,common,task,mean,random,merged,stacked,own"

REMEMBERING = (Base.BASE, Base.COMMON, Base.TASK, Base.MERGED, Base.STACKED, Base.OWN)
"""Those that also get past items into the prompt, what an app would do instead: as few and as many as rows know."""

_WRITTEN = re.compile(
    r"(?P<base>[a-z]+)(?::(?P<source>[a-z]+))?(?:@(?P<what>[kn])(?P<count>[1-9][0-9]{0,2}))?"
    r"(?P<history>\+history(?:@h(?P<items>[1-9]|1[0-6]))?)?"
)


@dataclass(frozen=True, slots=True)
class EvalMethod:
    """One method.

    Attributes:
        base: its adapter.
        source: where merged weights come from; None for the bank's rule.
        k: most anchors that are fused, written `@k4`; None for the rule's.
        items: how many of the profile's last items are known, written `@n5`; None for all.
        history: how many of the user's most relevant past items stand in the prompt, written `+history@h3`.
    """

    base: Base
    source: str | None = None
    k: int | None = None
    items: int | None = None
    history: int = 0

    @property
    def name(self) -> str:
        """The name as users write it."""
        source = f":{self.source}" if self.source else ""
        varied = f"@k{self.k}" if self.k else f"@n{self.items}" if self.items else ""
        history = f"{HISTORY}@h{self.history}" if self.history else ""
        return f"{self.base.value}{source}{varied}{history}"

    @property
    def plain(self) -> EvalMethod:
        """The same method without history: its adapter is the same."""
        return replace(self, history=0)

    @property
    def varied(self) -> bool:
        """Whether it is a point on a curve: a method with its own k or number of items."""
        return self.k is not None or self.items is not None

    @property
    def trained(self) -> bool:
        """Whether it trains an adapter for each user."""
        return self.base in (Base.STACKED, Base.OWN)


def parse_method(name: str) -> EvalMethod:
    """A method from its name.

    Raises:
        BankError: when it is not a method, listing those there are.
    """
    written = _WRITTEN.fullmatch(name)
    if written and written["base"] in list(Base):
        base, source, count = Base(written["base"]), written["source"], written["count"]
        merges = base in (Base.MERGED, Base.STACKED)
        history = int(written["items"] or 1) if written["history"] else 0
        if source in (None, *SOURCES) and (merges or not (source or count)) and not (history and base is Base.PRIOR):
            k, items = (int(count) if count and written["what"] == what else None for what in "kn")
            return EvalMethod(base, source, k, items, history)
    raise BankError(
        f"{name!r} is not a method. Methods are {', '.join(Base)}; merged and stacked take "
        f"{', '.join(':' + known for known in SOURCES)}, and @k4 (the best 4 anchors) or @n5 (the last 5 items); "
        f"each but prior takes {HISTORY}@h3 (3 past items in the prompt; {HISTORY} alone is one)"
    )


def parse_methods(text: str) -> list[EvalMethod]:
    """Methods from their names, joined by commas; each once.

    Raises:
        BankError: naming the first that is not a method.
    """
    return list(dict.fromkeys(parse_method(name.strip()) for name in text.split(",")))


def default_methods(kind: AnswerKind) -> list[EvalMethod]:
    """All methods for a task with such answers."""
    plain = [EvalMethod(Base.PRIOR)] if kind != "text" else []
    plain += parse_methods(DEFAULT)
    return plain + [EvalMethod(base, history=count) for base in REMEMBERING for count in few_and_many(kind)]


def curves(anchors: int, items: int) -> list[EvalMethod]:
    """Points of two curves: `merged` by how many anchors are fused, and by how many items are known.

    Args:
        anchors: how many the bank has.
        items: how many the longest profile has.
    """
    ks = sorted({k for k in (1, 2, 4, 8, 16) if k < anchors} | {anchors})
    ns = [n for n in (1, 2, 5, 10, 20) if n < items]
    return [EvalMethod(Base.MERGED, k=k) for k in ks] + [EvalMethod(Base.MERGED, items=n) for n in ns]
