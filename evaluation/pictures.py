"""Charts of an evaluation's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.methods import METHODS
from evaluation.run import Record
from evaluation.summary import MethodRow, user_losses

GAINS_FILE, CURVES_FILE, PRICES_FILE = "gain_per_user.png", "loss_by_k_and_items.png", "loss_by_price.png"
_INK, _GOOD, _BAD, _PALE = "#1f2933", "#2a9d8f", "#d1495b", "#9aa5b1"
_COLOURS = ("#d1495b", "#2a9d8f", "#1f2933", "#e9a23b", "#3d6cb9", "#8a5fbf", "#9aa5b1", "#7a5c3e")
_MARKS = ("o", "^", "s", "D")  # one per number of past items in the prompt

Losses = Mapping[str, Mapping[str, float]]  # each user's mean loss, by method


def draw(records: Sequence[Record], rows: Sequence[MethodRow], folder: Path) -> None:
    losses = user_losses(records)
    figures = {GAINS_FILE: gains_figure(losses), CURVES_FILE: curves_figure(losses), PRICES_FILE: prices_figure(rows)}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=140, bbox_inches="tight")


def gains_figure(losses: Losses) -> Any:
    """Draw each user's gain over a baseline, sorted, with one panel per method; None without those methods."""
    against = next((name for name in ("task", "base") if name in losses), None)
    shown = [name for name in ("merged", "stacked", "own") if name in losses]
    if against is None or not shown:
        return None
    figure, panels = _panels(len(shown))
    for panel, method in zip(panels, shown, strict=True):
        gains = sorted((losses[against][user] - loss for user, loss in losses[method].items()), reverse=True)
        panel.bar(range(len(gains)), gains, color=[_GOOD if gain > 0 else _BAD for gain in gains], width=0.85)
        panel.axhline(0, color=_INK, linewidth=0.8)
        panel.set_title(f"{method}: {sum(gain > 0 for gain in gains)} of {len(gains)} users gain", fontsize=10)
        panel.set_xlabel("users, sorted")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"gain over {against}, nats per token")
    return figure


def prices_figure(rows: Sequence[MethodRow]) -> Any:
    """Draw the loss of each method against its costs: bytes stored per user, and additional prompt tokens."""
    methods = [METHODS[row.method] for row in rows]
    adapters = list(dict.fromkeys(method.adapter for method in methods))
    colours = {name: _COLOURS[position % len(_COLOURS)] for position, name in enumerate(reversed(adapters))}
    marks = {n: _MARKS[min(position, 3)] for position, n in enumerate(sorted({method.history for method in methods}))}
    shortest = min((row.prompt_tokens for row in rows if row.prompt_tokens), default=0.0)
    # A base model above all others is drawn at the upper edge with its loss, so as not to stretch the scale.
    top = max([row.loss for row in rows if not row.method.startswith("base")] or [row.loss for row in rows])
    figure, panels = _panels(2, size=4.4)
    prices = ((panels[0], lambda row: row.kept_bytes), (panels[1], lambda row: max(0.0, row.prompt_tokens - shortest)))
    for name, (panel, price) in product(adapters, prices):
        line = sorted(((m.history, price(r), r.loss) for m, r in zip(methods, rows, strict=True) if m.adapter == name))
        colour, above = colours[name], defaultdict[float, list[str]](list)
        panel.plot([x for _, x, _ in line], [min(loss, top) for *_, loss in line], color=colour, lw=0.8, alpha=0.5)
        for history, x, loss in line:
            panel.plot(x, min(loss, top), marks[history], color=colour, ms=6.5, mew=0, alpha=0.85, clip_on=False)
            if loss > top:
                above[x].append(f"{loss:.2f}")
        for x, losses in above.items():
            panel.annotate(f"{', '.join(losses)} ↑", (x, top), (4, 4), textcoords="offset points", fontsize=7)
    panels[0].set_xscale("symlog", linthresh=100)
    panels[0].set(xlabel="bytes stored per user", ylabel="loss, nats per token", xlim=(-30, None))
    panels[1].set_xlabel("additional prompt tokens")
    for name in adapters:
        panels[1].plot([], [], color=colours[name], linewidth=3, label=name)
    for count, mark in marks.items():
        panels[1].plot([], [], color=_PALE, marker=mark, linestyle="", label=f"past items in the prompt: {count}")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def curves_figure(losses: Losses) -> Any:
    """Draw the loss of `merged` and `mean` by number of anchors and items, `common` dashed; None without points."""
    points = {name: METHODS[name] for name in losses if METHODS[name].on_curve}
    sampled = {user for name in points for user in losses[name]}
    curves = {"anchors of the bank": "k", "known items per user": "items"}
    shown = {label: part for label, part in curves.items() if any(getattr(point, part) for point in points.values())}
    if not shown:
        return None
    figure, panels = _panels(len(shown))
    for panel, (label, part) in zip(panels, shown.items(), strict=True):
        for adapter, colour in (("merged", _GOOD), ("mean", _BAD)):
            of_it = [(getattr(point, part), name) for name, point in points.items() if point.adapter == adapter]
            curve = sorted((count, float(np.mean(list(losses[name].values())))) for count, name in of_it if count)
            panel.plot(*zip(*curve, strict=True), marker="o", markersize=4, color=colour, label=adapter)
        if "common" in losses:
            common = np.mean([loss for user, loss in losses["common"].items() if user in sampled])
            panel.axhline(float(common), color=_PALE, linewidth=1, linestyle="--", label="common")
        counts = sorted({getattr(point, part) for point in points.values()} - {None})
        panel.set_xscale("log")
        panel.set_xticks(counts, [str(count) for count in counts], minor=False)
        panel.minorticks_off()
        panel.set_xlabel(label)
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _panels(count: int, size: float = 3.6) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * count, size), layout="tight")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels
