"""Draw traces and the dashboard's queries."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from PIL import Image

from deploy.observe.dashboard import Graph, graphs
from deploy.observe.pictures.prometheus import HURRY_S, Prometheus
from deploy.observe.pictures.receiver import Span

COLOURS = {"mta-gateway": "#2a9d8f", "mta-engine": "#e76f51", "mta-worker": "#457b9d"}
INK, PALE = "#1f2933", "#9aa5b1"
COLUMNS = 3
_NAMES = {"POST": "call of the engine", "llm_request": "llm_request (vLLM's own)"}
_SCALES = {"s": (1000, "ms"), "bytes": (1 / (1 << 20), "MiB"), "percentunit": (100, "%"), "reqps": (1, "a second")}


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of a picture of a trace: one span, or all commands to the store by one span."""

    service: str
    name: str
    pieces: tuple[tuple[int, int], ...]

    @property
    def start_ns(self) -> int:
        return self.pieces[0][0]

    @property
    def end_ns(self) -> int:
        return max(end for _, end in self.pieces)

    @property
    def ms(self) -> float:
        return sum(end - start for start, end in self.pieces) / 1e6


def bars_of(spans: Sequence[Span]) -> list[Bar]:
    """Return the bars of a trace, parents before children, by start time."""
    known = {span.id for span in spans}
    found: list[Bar] = []

    def add(parent: str) -> None:
        below = [span for span in spans if span.parent == parent or (not parent and span.parent not in known)]
        commands = [span for span in below if "db.system" in span.attributes]
        if commands:
            name = "Redis: " + (commands[0].name if len(commands) == 1 else f"{len(commands)} commands")
            found.append(Bar(commands[0].service, name, tuple((span.start_ns, span.end_ns) for span in commands)))
        for span in below:
            if "db.system" not in span.attributes:
                found.append(Bar(span.service, _NAMES.get(span.name, span.name), ((span.start_ns, span.end_ns),)))
                add(span.id)

    add("")
    return found


def draw_traces(request: Sequence[Span], job: Sequence[Span], answer: Sequence[Span], path: Path) -> None:
    """A request, and a job with the first answer by what it made, which is linked to it."""
    upper, lower, linked = bars_of(request), bars_of(job), bars_of(answer)
    heights = [len(upper), len(lower) + len(linked)]
    figure, panels = pyplot.subplots(2, 1, figsize=(11, 1.8 + 0.3 * sum(heights)), height_ratios=heights)
    _draw_bars(panels[0], upper, "A request for a recipe that nobody has asked for before: one trace")
    _draw_bars(
        panels[1],
        [*lower, *linked],
        "An adapt request and its job: one trace. Below the line the first answer by the adapter, linked to it",
    )
    panels[1].axhline(len(lower) - 0.5, color=INK, linewidth=0.8, linestyle="--")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    panels[0].legend(handles, COLOURS, frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    _save(figure, path)


def _draw_bars(panel: Any, bars: Sequence[Bar], title: str) -> None:
    first_ns = min(bar.start_ns for bar in bars)
    width_ms = (max(bar.end_ns for bar in bars) - first_ns) / 1e6
    for row, bar in enumerate(bars):
        pieces = [((start - first_ns) / 1e6, max((end - start) / 1e6, width_ms / 400)) for start, end in bar.pieces]
        panel.broken_barh(pieces, (row - 0.35, 0.7), facecolors=COLOURS[bar.service])
    panel.set_yticks(range(len(bars)), [f"{bar.name}   {bar.ms:.{0 if bar.ms >= 10 else 1}f} ms" for bar in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(0, width_ms * 1.01)
    panel.set_xlabel("ms", fontsize=8)
    panel.set_title(title, fontsize=9, loc="left", color=INK)
    _plain(panel)


def draw_dashboard(prometheus: Prometheus, start_s: float, end_s: float, path: Path) -> None:
    """Draw every graph of the dashboard."""
    shown = graphs()
    rows = math.ceil(len(shown) / COLUMNS)
    figure, panels = pyplot.subplots(rows, COLUMNS, figsize=(15, 2.5 * rows))
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    for panel, graph in zip(panels.flat, shown, strict=False):
        _draw_graph(panel, graph, prometheus, start_s, end_s)
    _save(figure, path)


def _draw_graph(panel: Any, graph: Graph, prometheus: Prometheus, start_s: float, end_s: float) -> None:
    factor, unit = _SCALES.get(graph.unit, (1, ""))
    for query in graph.queries:
        for series in prometheus.over_time(query.expression, start_s, end_s, HURRY_S):
            points = [(at - start_s, factor * float(value)) for at, value in series["values"]]
            labels = series["metric"]
            legend = re.sub(r"\{\{(\w+)\}\}", lambda found, by=labels: by.get(found[1], ""), query.legend)
            label = legend.replace("127.0.0.1", "").strip(", ") or "none"
            panel.plot(*zip(*points, strict=True), linewidth=1.3, label=label)
    panel.set_title(f"{graph.title}{f', {unit}' if unit else ''}", fontsize=9, loc="left", color=INK)
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, end_s - start_s)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(frameon=False, fontsize=6.5, ncols=2, loc="upper left")
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * 1.35)
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=7, colors=INK)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(PALE)


def _save(figure: Any, path: Path) -> None:
    """Save in 128 colours: a third of the bytes without a visible difference."""
    figure.tight_layout()
    raw = BytesIO()
    figure.savefig(raw, dpi=110)
    pyplot.close(figure)
    picture = Image.open(raw).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
