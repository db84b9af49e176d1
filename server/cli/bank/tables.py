"""`mta bank info` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `bank.lookup.summary.summarise` found."""
    console = console or Console(highlight=False)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(summary):
        facts.add_row(name, value)
    console.print(facts)
    anchors = Table("anchor", "items", title=f"{len(summary['anchors'])} anchors", title_justify="left")
    for anchor in summary["anchors"]:
        anchors.add_row(anchor["id"], str(anchor["items"]))
    console.print(anchors)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    base, embedder, index, weights = (summary[key] for key in ("base_model", "embedder", "index", "weights"))
    sizes = ", ".join(f"{name} {decimal(count)}" for name, count in summary["bytes"].items())
    common = "with a common row" if summary["common"] else "no common row"
    return [
        ("bank", summary["folder"]),
        ("fingerprint", summary["fingerprint"]),
        ("task", summary["task"]),
        ("base model", f"{base['name']} ({base['hash'][:12]}…)"),
        ("embedder", f"{embedder['id']}, {embedder['dim']} dimensions"),
        ("method", f"{summary['method']}, {common}"),
        ("adapted", f"{summary['modules']} modules: {', '.join(summary['target_modules'])}"),
        ("weights", _rule(weights)),
        ("index", f"{index['kind']}, {index['anchors']} anchors of {index['dim']} dimensions"),
        (
            "rank",
            f"{summary['rank']} per anchor, {summary['fused_rank']} fused, {summary['serving_rank']} served; "
            f"user adapters: up to rank {summary['room']}",
        ),
        ("size", f"{sizes}; {decimal(summary['row_bytes'])} per anchor"),
        ("training", ", ".join(f"{key} {value}" for key, value in summary["training"].items() if value is not None)),
        ("verdict", summary["in_words"]),
    ]


def _rule(weights: Mapping[str, Any]) -> str:
    """The rule of weights in one line."""
    topic = f"topic, at most {weights['anchors']} anchors, strength {weights['strength']:g}"
    if stepping := weights["posterior"]:
        rule = f"posterior, at most {stepping['anchors']} anchors, decay {stepping['decay']:g}"
        return f"{rule}; until there is a signature, {topic}"
    return topic
