"""Pictures of an evaluation, for people who would rather look than read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bank.evaluation.methods import Base, parse_method
from bank.evaluation.records import Record
from bank.evaluation.report.summary import MethodRow, user_losses
from bank.items.profile import Vectors

GAINS_FILE, CURVES_FILE, MAP_FILE = "gain_per_user.png", "loss_by_k_and_items.png", "anchors_and_users.png"
PRICES_FILE = "loss_by_price.png"
_INK, _GOOD, _BAD, _PALE = "#1f2933", "#2a9d8f", "#d1495b", "#9aa5b1"
_COLOURS = ("#d1495b", "#2a9d8f", "#1f2933", "#e9a23b", "#3d6cb9", "#8a5fbf", "#9aa5b1", "#7a5c3e")
_MARKS = ("o", "^", "s", "D")  # by how many past items the prompt has


def draw_gains(records: Sequence[Record], path: Path, *, against: str, methods: Sequence[str]) -> None:
    """Each user's gain over a baseline, sorted: how many gain, how much, and who loses.

    Args:
        records: of all methods.
        path: where the picture goes.
        against: the baseline.
        methods: one panel each.
    """
    losses = user_losses(records)
    shown = [method for method in methods if method in losses]
    figure, panels = _panels(len(shown))
    for panel, method in zip(panels, shown, strict=True):
        gains = sorted((losses[against][user] - loss for user, loss in losses[method].items()), reverse=True)
        panel.bar(range(len(gains)), gains, color=[_GOOD if gain > 0 else _BAD for gain in gains], width=0.85)
        panel.axhline(0, color=_INK, linewidth=0.8)
        won = sum(gain > 0 for gain in gains)
        panel.set_title(f"{method}: {won} of {len(gains)} users gain", fontsize=10, color=_INK)
        panel.set_xlabel("users, sorted")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"gain over {against}, nats per token")
    _save(figure, path)


def draw_prices(rows: Sequence[MethodRow], path: Path) -> None:
    """The loss of each method against what it costs: bytes kept of a user, and tokens that prompts get longer by.

    A colour is an adapter, a mark how many past items the prompt has; a line joins what differs in that alone. The base
    model, which may lie far above all others, does not stretch the scale: it is drawn at the upper edge with its loss
    beside it.

    Args:
        rows: of one table.
        path: where the picture goes.
    """
    methods = [parse_method(row.method) for row in rows]
    adapters = list(dict.fromkeys(method.plain.name for method in methods))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(reversed(adapters))}
    marks = {count: _MARKS[min(place, 3)] for place, count in enumerate(sorted({m.history for m in methods}))}
    shortest = min((row.prompt_tokens for row in rows if row.prompt_tokens), default=0.0)
    top = max(
        (row.loss for row, method in zip(rows, methods, strict=True) if method.base is not Base.BASE),
        default=max(row.loss for row in rows),
    )
    figure, panels = _panels(2, size=4.4)
    joined: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in adapters}
    for row, method in zip(rows, methods, strict=True):
        joined[method.plain.name].append(
            (method.history, row.kept_bytes, max(0.0, row.prompt_tokens - shortest), row.loss)
        )
    for name, found in joined.items():
        for place, panel in enumerate(panels, 1):
            above: dict[float, list[str]] = defaultdict(list)
            line = [(point[place], min(point[3], top)) for point in sorted(found)]
            panel.plot(*zip(*line, strict=True), color=colours[name], linewidth=0.8, alpha=0.5)
            for (history, *_, loss), (price, height) in zip(sorted(found), line, strict=True):
                look = {"marker": marks[history], "s": 42, "linewidth": 0, "alpha": 0.85, "clip_on": False}
                panel.scatter(price, height, color=colours[name], **look)
                if loss > top:
                    above[price].append(f"{loss:.2f}")
            for price, losses in above.items():
                panel.annotate(f"{', '.join(losses)} ↑", (price, top), (4, 4), textcoords="offset points", fontsize=7)
    panels[0].set_xscale("symlog", linthresh=100)
    panels[0].set_xlim(left=-30)
    panels[0].set_xlabel("bytes kept of a user")
    panels[1].set_xlabel("tokens that prompts get longer by")
    panels[0].set_ylabel("loss, nats per token")
    for name in adapters:
        panels[1].plot([], [], color=colours[name], linewidth=3, label=name)
    for count, mark in marks.items():
        panels[1].plot([], [], color=_PALE, marker=mark, linestyle="", label=f"past items in the prompt: {count}")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def draw_map(anchors: Vectors, people: Vectors, nearest: Sequence[Sequence[int]], path: Path) -> None:
    """Anchors and users on the two main axes of the anchors' embeddings, each user tied to the anchors of their recipe.

    Args:
        anchors: [N, E].
        people: [P, E].
        nearest: for each of the people, the anchors of their recipe.
        path: where the picture goes.
    """
    both = np.concatenate([anchors, people])
    centred = both - both.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = centred @ axes.T
    a, p = flat[: len(anchors)], flat[len(anchors) :]
    figure, (panel,) = _panels(1, size=6.0)
    for place, chosen in zip(p, nearest, strict=True):
        for anchor in chosen:
            panel.plot(*zip(place, a[anchor], strict=True), color=_PALE, linewidth=0.5, alpha=0.6, zorder=1)
    panel.scatter(*p.T, s=16, color=_GOOD, label="users", zorder=2)
    panel.scatter(*a.T, s=90, marker="^", color=_INK, label="anchors", zorder=3)
    for number, place in enumerate(a):
        panel.annotate(f"a{number:02d}", place, fontsize=7, xytext=(4, 4), textcoords="offset points", color=_INK)
    panel.legend(frameon=False, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
    _save(figure, path)


def draw_curves(records: Sequence[Record], path: Path) -> bool:
    """Loss of `merged` against how many anchors are fused, and against how many items are known.

    The dashed line is the bank's own rule with everything known, for the same users. Returns False where there are no
    such records.
    """
    by_user = user_losses(records)
    sampled = {user for method, users in by_user.items() if parse_method(method).varied for user in users}
    losses = {m: [loss for user, loss in users.items() if user in sampled] for m, users in by_user.items()}
    axes = {"anchors that speak, k": "k", "items known of a user": "items"}
    points = {label: _points(losses, what) for label, what in axes.items()}
    shown = {label: found for label, found in points.items() if found}
    if not shown:
        return False
    figure, panels = _panels(len(shown))
    for panel, (label, found) in zip(panels, shown.items(), strict=True):
        places = range(len(found))
        panel.plot(places, [np.mean(values) for _, values in found], marker="o", markersize=4, color=_GOOD)
        if Base.MERGED in losses:
            panel.axhline(float(np.mean(losses[Base.MERGED])), color=_PALE, linewidth=1, linestyle="--")
        panel.set_xticks(places, [str(count) for count, _ in found])
        panel.set_xlabel(label)
    panels[0].set_ylabel("merged: loss, nats per token")
    _save(figure, path)
    return True


def _points(losses: Mapping[str, Sequence[float]], what: str) -> list[tuple[int, Sequence[float]]]:
    """Counts and losses of the methods that vary one thing, the smallest count first."""
    methods = [(getattr(parse_method(name), what), values) for name, values in losses.items()]
    return sorted((count, values) for count, values in methods if count is not None)


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
