"""What every benchmark prints: medians with their spread, as a table for people and JSON for the record."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

FILE_COLUMNS = 140


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with minimum and maximum of `n` readings, in the unit of the readings."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        """The spread of at least one reading."""
        return cls(median(readings), min(readings), max(readings), len(readings))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f}, n={self.n})"


def percentile(readings: Sequence[float], share: float) -> float:
    """The reading below which `share` (0 to 1) of them lie, by nearest rank."""
    ordered = sorted(readings)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def processor() -> str:
    """The machine's processor, for the record."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def console() -> Console:
    """Where tables go: as wide as the terminal, or of a fixed width without one."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS)


def report(title: str, rows: Sequence[tuple[str, object]], out: Path | None, **details: object) -> None:
    """Print a two-column table and, if `out` is given, write the same with all details as JSON.

    Args:
        title: what was measured, with model, dtype and sizes.
        rows: label and value; a `Spread` is shown as median (min to max).
        out: JSON file, or None.
        details: raw readings and settings, for the JSON alone.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    for label, value in rows:
        table.add_row(label, str(value))
    console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content: Mapping[str, object] = {
            "title": title,
            "machine": processor(),
            "rows": {label: asdict(value) if isinstance(value, Spread) else value for label, value in rows},
            **details,
        }
        out.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
