"""Hours and weeks in UTC, by which answers, keys and experiments are dated."""

from __future__ import annotations

import time
from datetime import date, timedelta

WEEK_HOURS = 7 * 24


def this_hour() -> int:
    """Return the number of hours since 1970."""
    return int(time.time()) // 3600


def week_of(hour: int) -> int:
    """Return the number of the week, from Monday, of an hour since 1970, which began on a Thursday."""
    return (hour + 3 * 24) // WEEK_HOURS


def monday(week: int) -> date:
    """Return the first day of a week, by the number that `week_of` gives it."""
    return date(1970, 1, 1) + timedelta(days=7 * week - 3)
