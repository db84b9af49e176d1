"""Charts of an evaluation's results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bank.evaluation.methods import METHODS
from bank.evaluation.run import Record
from bank.evaluation.summary import MethodRow, user_losses

GAINS_FILE, CURVES_FILE, PRICES_FILE = "gain_per_user.png", "loss_by_k_and_items.png", "loss_by_price.png"
_INK, _GOOD, _BAD, _PALE = "#1f2933", "#2a9d8f", "#d1495b", "#9aa5b1"
_COLOURS = ("#d1495b", "#2a9d8f", "#1f2933", "#e9a23b", "#3d6cb9", "#8a5fbf", "#9aa5b1", "#7a5c3e")
_MARKS = ("o", "^", "s", "D")  # one per number of past items in the prompt


def draw(records: Sequence[Record], rows: Sequence[MethodRow], folder: Path) -> None:
    losses = user_losses(records)
    against = next((name for name in ("task", "base") if name in losses), None)
    shown = [name for name in ("merged", "stacked", "own") if name in losses]
    if against and shown:
        draw_gains({name: losses[name] for name in shown}, losses[against], against, folder / GAINS_FILE)
    draw_curves(losses, folder / CURVES_FILE)
    draw_prices(rows, folder / PRICES_FILE)


def draw_gains(losses: dict[str, dict[str, float]], theirs: dict[str, float], against: str, path: Path) -> None:
    """Draw each user's gain over a baseline, sorted, with one panel per method."""
    figure, panels = _panels(len(losses))
    for panel, (method, ours) in zip(panels, losses.items(), strict=True):
        gains = sorted((theirs[user] - loss for user, loss in ours.items()), reverse=True)
        panel.bar(range(len(gains)), gains, color=[_GOOD if gain > 0 else _BAD for gain in gains], width=0.85)
        panel.axhline(0, color=_INK, linewidth=0.8)
        won = sum(gain > 0 for gain in gains)
        panel.set_title(f"{method}: {won} of {len(gains)} users gain", fontsize=10, color=_INK)
        panel.set_xlabel("users, sorted")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"gain over {against}, nats per token")
    _save(figure, path)


def draw_prices(rows: Sequence[MethodRow], path: Path) -> None:
    """Draw the loss of each method against its costs: bytes stored per user, and additional prompt tokens.

    Colours are adapters and marks are numbers of past items in the prompt; a line joins points with the same adapter.
    If the base model is above all others, it is drawn at the upper edge with its loss, so as not to stretch the scale.
    """
    methods = [METHODS[row.method] for row in rows]
    adapters = list(dict.fromkeys(method.adapter for method in methods))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(reversed(adapters))}
    marks = {n: _MARKS[min(place, 3)] for place, n in enumerate(sorted({method.history for method in methods}))}
    shortest = min((row.prompt_tokens for row in rows if row.prompt_tokens), default=0.0)
    top = max([row.loss for row in rows if not row.method.startswith("base")] or [row.loss for row in rows])
    figure, panels = _panels(2, size=4.4)
    prices = ((panels[0], lambda row: row.kept_bytes), (panels[1], lambda row: max(0.0, row.prompt_tokens - shortest)))
    for name, (panel, price) in product(adapters, prices):
        found = sorted(((m.history, price(r), r.loss) for m, r in zip(methods, rows, strict=True) if m.adapter == name))
        colour, above = colours[name], defaultdict[float, list[str]](list)
        panel.plot([x for _, x, _ in found], [min(loss, top) for *_, loss in found], color=colour, lw=0.8, alpha=0.5)
        for history, x, loss in found:
            panel.plot(x, min(loss, top), marks[history], color=colour, ms=6.5, mew=0, alpha=0.85, clip_on=False)
            if loss > top:
                above[x].append(f"{loss:.2f}")
        for x, losses in above.items():
            panel.annotate(f"{', '.join(losses)} ↑", (x, top), (4, 4), textcoords="offset points", fontsize=7)
    panels[0].set_xscale("symlog", linthresh=100)
    panels[0].set(xlabel="bytes stored per user", ylabel="loss, nats per token")
    panels[0].set_xlim(left=-30)
    panels[1].set_xlabel("additional prompt tokens")
    for name in adapters:
        panels[1].plot([], [], color=colours[name], linewidth=3, label=name)
    for count, mark in marks.items():
        panels[1].plot([], [], color=_PALE, marker=mark, linestyle="", label=f"past items in the prompt: {count}")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def draw_curves(by_user: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the loss of `merged` against the number of fused anchors and of known items, if those were evaluated.

    The dashed line is the bank's own rule with all items, for the same users.
    """
    points = {name: METHODS[name] for name in by_user if METHODS[name].on_curve}
    sampled = {user for name in points for user in by_user[name]}
    curves = {
        "fused anchors, k": sorted((method.k, name) for name, method in points.items() if method.k),
        "known items per user": sorted((method.items, name) for name, method in points.items() if method.items),
    }
    shown = {label: found for label, found in curves.items() if found}
    if not shown:
        return
    figure, panels = _panels(len(shown))
    for panel, (label, found) in zip(panels, shown.items(), strict=True):
        means = [np.mean(list(by_user[name].values())) for _, name in found]
        panel.plot(range(len(found)), means, marker="o", markersize=4, color=_GOOD)
        if "merged" in by_user:
            own = np.mean([loss for user, loss in by_user["merged"].items() if user in sampled])
            panel.axhline(float(own), color=_PALE, linewidth=1, linestyle="--")
        panel.set_xticks(range(len(found)), [str(count) for count, _ in found])
        panel.set_xlabel(label)
    panels[0].set_ylabel("merged: loss, nats per token")
    _save(figure, path)


def _panels(count: int, size: float = 3.6) -> tuple[Any, Sequence[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, count, figsize=(size * count, size), sharey=True, squeeze=False)
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, list(panels[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
