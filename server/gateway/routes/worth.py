"""`GET /worth`: what personalisation is worth, by the users that are held out."""

from __future__ import annotations

from datetime import date
from typing import Any, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.clock import monday
from server.gateway.experiments.arms import Arm, Level
from server.gateway.experiments.comparisons import BEGIN, COUNTING, Comparison, comparisons_of, weeks_of
from server.gateway.experiments.confidence import SequentialInterval, Totals
from server.gateway.experiments.tallies import SHARE_UNIT, Metric, metrics_of
from server.gateway.parts import call_of
from server.store.tallies import Cell, Counts


class ArmAnswer(BaseModel, frozen=True):
    people_weeks: int = Field(description="Number of people, each counted once a week.")
    mean: float | None = Field(description="Mean of one number per person and week, 0 to 1.")

    @classmethod
    def of(cls, totals: Totals) -> Self:
        return cls(people_weeks=totals.n, mean=totals.mean if totals.n else None)


class ComparisonAnswer(BaseModel, frozen=True):
    """A level against the one below it, by one metric."""

    level: Level
    metric: Metric = Field(
        description="`changed`: share of the text that people change. `sent`, `discarded`: share of answers with an "
        "outcome. `up`: share of ratings. `silent`: share of answers without feedback."
    )
    holdout: float = Field(description="Share of users held out; another share begins another comparison.")
    lower: ArmAnswer = Field(description="People answered one level lower.")
    full: ArmAnswer = Field(description="People answered on this level.")
    difference: SequentialInterval | None = Field(description="`lower` less `full`; null until enough are known.")
    saved: SequentialInterval | None = Field(description="The difference over `lower`, for `changed` and `discarded`.")
    needed: int | None = Field(description="About how many more people-weeks tell the arms apart; 0: they are.")
    says: str = Field(description="The result in words, and what to do.")

    @classmethod
    def of(cls, known: Comparison) -> Self:
        names = ("level", "metric", "difference", "saved", "needed", "says")
        return cls(
            holdout=known.share / SHARE_UNIT,
            lower=ArmAnswer.of(known.lower),
            full=ArmAnswer.of(known.full),
            **{name: getattr(known, name) for name in names},
        )


class WeekAnswer(BaseModel, frozen=True):
    """What happened to the answers of one week, level and arm."""

    week: date = Field(description="Its Monday, UTC.")
    level: Level = Field(description="Level of the arm `full`; the arm `lower` was answered one level lower.")
    arm: Arm
    holdout: float
    people: int
    answers: int
    feedback: int = Field(description="Answers with feedback.")
    sent: int
    edited: int
    discarded: int
    up: int
    down: int
    shares: dict[Metric, float] = Field(
        description="Each metric, 0 to 1, of all answers alike; null if no answer says anything about it."
    )

    @classmethod
    def of(cls, cell: Cell, people: int, counts: Counts) -> Self:
        names = ("answers", "sent", "edited", "discarded", "up", "down")
        return cls(
            week=monday(cell.week),
            level=Level(cell.level),
            arm=Arm(cell.arm),
            holdout=cell.share / SHARE_UNIT,
            people=people,
            feedback=int(counts.answered),
            shares={metric: round(fraction, 4) for metric, fraction in metrics_of(counts).items()},
            **{name: int(getattr(counts, name)) for name in names},
        )


class RunningAnswer(BaseModel, frozen=True):
    week: date = Field(description="Its Monday, UTC.")
    people: int = Field(description="People with compared answers so far.")


_EXAMPLE: dict[str, Any] = {
    "says": ["stacked saves 18 % (11 to 25) of what people change: keep it"],
    "running": [{"week": "2026-11-30", "people": 412}],
    "comparisons": [
        {
            "level": "stacked",
            "metric": "changed",
            "holdout": 0.05,
            "lower": {"people_weeks": 380, "mean": 0.41},
            "full": {"people_weeks": 7150, "mean": 0.336},
            "difference": {"estimate": 0.074, "low": 0.044, "high": 0.104},
            "saved": {"estimate": 0.18, "low": 0.11, "high": 0.25},
            "needed": 0,
            "says": "stacked saves 18 % (11 to 25) of what people change: keep it",
        }
    ],
    "weeks": [
        {
            **{"week": "2026-11-23", "level": "stacked", "arm": "lower", "holdout": 0.05, "people": 48},
            **{"answers": 310, "feedback": 201, "sent": 88, "edited": 97, "discarded": 16, "up": 12, "down": 5},
            "shares": {"changed": 0.4021, "sent": 0.4378, "discarded": 0.0796, "up": 0.7059, "silent": 0.3516},
        }
    ],
}


class WorthAnswer(BaseModel):
    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_EXAMPLE]})

    says: list[str] = Field(description="The results in words, or how to begin.")
    running: list[RunningAnswer] = Field(description="Weeks whose people are not counted yet.")
    comparisons: list[ComparisonAnswer] = Field(description="Over all weeks since this share of users is held out.")
    weeks: list[WeekAnswer] = Field(description="The last 13 finished weeks, newest first.")


router = APIRouter(tags=["learn"])


@router.get("/worth")
async def read_worth(request: Request) -> WorthAnswer:
    """Say what personalisation is worth to the users of the caller's tenant, from their feedback.

    A share of users (`MTA_HOLDOUT`, or the API key's) is answered one level lower for a week, drawn anew each week. A
    user's answers make one number per week and metric, counted once the week is over.
    """
    call = call_of(request)
    gateway, tenant = call.gateway, call.caller.tenant
    store = gateway.tallies.store
    sums = await store.sums(tenant)
    running = [(week, await store.people(week, tenant)) for week in await store.weeks(tenant)]
    comparisons = [ComparisonAnswer.of(known) for known in comparisons_of(sums)]
    begun = running or gateway.keys.holds_out(tenant, gateway.settings.holdout)
    return WorthAnswer(
        says=[known.says for known in comparisons] or [COUNTING if begun else BEGIN],
        running=[RunningAnswer(week=monday(week), people=people) for week, people in running],
        comparisons=comparisons,
        weeks=[WeekAnswer.of(*week) for week in weeks_of(sums)],
    )
