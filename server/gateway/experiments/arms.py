"""How personally a user is answered: the levels, and the arm that a user is in while levels are compared."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from server.clock import this_hour, week_of


class Level(StrEnum):
    """How personal an answer is."""

    BASE = "base"
    MERGED = "merged"
    STACKED = "stacked"
    COMMON = "common"  # between base and merged: what all users share; for comparison, and for the forgotten


class Arm(StrEnum):
    """How a user is answered this week: a share of users is held out, so that the others can be compared with them."""

    FULL = "full"  # as personally as possible
    LOWER = "lower"  # one level lower
    NONE = "none"  # not compared: nobody is held out, the request chose a level, or the engine cannot serve it


def arm_of(user_key: str, holdout: float) -> Arm:
    """Return a user's arm in this week: `holdout` is the share of users in the lower one."""
    week = week_of(this_hour())
    drawn = hashlib.sha256(f"{week} {user_key}".encode()).digest()[:8]
    return Arm.LOWER if int.from_bytes(drawn) < holdout * (1 << 64) else Arm.FULL
