"""Draw pictures of results, at most one for each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.page.markdown import tables_of

_INK, _OURS, _OTHER, _PALE = "#1f2933", "#2a9d8f", "#d1495b", "#9aa5b1"
MOST_PANELS = 3
Lines = Sequence[Sequence[Any]]


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """Draw the pictures that the results allow as `performance_NAME.png`, and return the files by name."""
    drawn = {}
    for name, content in results.items():
        make = _PICTURES.get(content["bench"])
        figure = make(content) if make else None
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"performance_{name}.png"
        figure.savefig(path, dpi=140)
        drawn[name] = path
    return drawn


def _cost(content: Mapping[str, Any]) -> Any:
    """Plot each row's time relative to the base model's; return None if there are too many engines."""
    tables = tables_of(content)
    if len(tables) > MOST_PANELS:
        return None
    rows = max(len(found["lines"]) for found in tables)
    figure, panels = panels_in_a_row(len(tables), width=2.6 + 3.2 / len(tables), height=0.9 + 0.36 * rows, share=True)
    for panel, found in zip(panels, tables, strict=True):
        column = found["columns"].index("recipe over base")
        lines = list(reversed(found["lines"]))
        ratios = [line[column] for line in lines]
        spread = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
        panel.barh([line[0] for line in lines], [r["median"] for r in ratios], xerr=spread, color=_OURS, ecolor=_PALE)
        panel.axvline(1, color=_INK, linewidth=0.8)
        panel.set_title(_short(found["title"]), fontsize=8, color=_INK)
        panel.set_xlabel("over the base model's time", fontsize=8)
    return figure


def _thrash(content: Mapping[str, Any]) -> Any:
    """Plot tokens per second and time to first token against the number of users."""
    lines: Lines = tables_of(content)[0]["lines"]
    figure, panels = panels_in_a_row(2)
    for side, colour in zip(dict.fromkeys(line[1] for line in lines), (_OURS, _OTHER), strict=False):
        mine = [line for line in lines if line[1] == side]
        users = [line[0] for line in mine]
        panels[0].plot(users, [line[6]["median"] for line in mine], marker="o", color=colour, label=side)
        for at, style in ((2, "-"), (3, "--")):
            label = f"{side}, {'p50' if at == 2 else 'p99'}"
            panels[1].plot(users, [line[at] for line in mine], style, marker="o", color=colour, label=label)
    for panel, label in zip(panels, ("tokens a second", "time to first token, ms"), strict=True):
        panel.set_xscale("log")
        panel.set_xticks(sorted({line[0] for line in lines}), [str(n) for n in sorted({line[0] for line in lines})])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("users that take turns")
        panel.set_ylabel(label)
        panel.legend(frameon=False, fontsize=7)
    return figure


def _cold(content: Mapping[str, Any]) -> Any:
    """Plot the time until a recipe is usable, by step."""
    rows = [(label, value) for label, value in content["rows"].items() if isinstance(value, dict)]
    shown = [(label, value) for label, value in rows if " over " not in label and "first token" not in label]
    figure, (panel,) = panels_in_a_row(1, width=7.0, height=0.8 + 0.42 * len(shown))
    labels = [label for label, _ in reversed(shown)]
    values = [value["median"] for _, value in reversed(shown)]
    colours = [_OTHER if "load" in label else _OURS for label in labels]
    panel.barh(labels, values, color=colours)
    panel.set_xscale("log")
    panel.set_xlabel("ms")
    return figure


def _lasting(content: Mapping[str, Any]) -> Any:
    """Plot each part's memory and the store's keys over time, with a pale line for each event."""
    figure, (panel, keys) = panels_in_a_row(2, width=5.5, height=3.4)
    readings = content["readings"]
    hours = [reading["at_s"] / 3600 for reading in readings]
    for name in [name for name in readings[0] if name.endswith(", MiB")]:
        panel.plot(hours, [reading[name] for reading in readings], label=name.removesuffix(", MiB"), linewidth=1)
    keys.plot(hours, [reading["keys"] for reading in readings], color=_OURS, linewidth=1)
    for each, label in ((panel, "resident memory, MiB"), (keys, "keys in the store")):
        for _, at_s in content["events"]:
            each.axvline(at_s / 3600, color=_PALE, linewidth=0.3)
        each.set_ylim(bottom=0)
        each.set_xlabel("hours")
        each.set_ylabel(label)
    panel.legend(frameon=False, fontsize=7, ncols=4)
    return figure


_PICTURES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "cost": _cost,
    "thrash": _thrash,
    "cold": _cold,
    "lasting": _lasting,
}


def _short(title: str) -> str:
    """Return the rank and slots from the end of a title, which distinguish engines."""
    return ", ".join(title.split(", ")[-3:-1])


def panels_in_a_row(
    count: int, *, width: float = 3.8, height: float = 3.2, share: bool = False
) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="tight")
    panels = figure.subplots(1, count, squeeze=False, sharey=share)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels
