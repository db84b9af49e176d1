"""Figures as Markdown, and a page's blocks filled with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.page.report import shown

_BLOCK = re.compile(
    r"(?P<open><!-- figures: (?P<name>[\w-]+)(?: (?P<number>\d+))? -->\n).*?(?P<close><!-- end of figures -->)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Filled:
    """A page with its blocks filled; the results that were, and those that are missing."""

    text: str
    names: tuple[str, ...]
    missing: tuple[str, ...]


def fill(page: str, results: Mapping[str, Mapping[str, Any]], pictures: Mapping[str, str] | None = None) -> Filled:
    """Replace what stands in a page's blocks of results that are there; `pictures` are those of the same names."""
    names, missing = dict[str, None](), dict[str, None]()

    def replace(block: re.Match[str]) -> str:
        name, number = block["name"], block["number"]
        if name not in results:
            missing[name] = None
            return block[0]
        names[name] = None
        tables = _block(results[name], int(number) if number else None)
        picture = (pictures or {}).get(name)
        drawn = f"![{results[name]['bench']}]({picture})\n\n" if picture else ""
        return f"{block['open']}{tables}{drawn}{block['close']}"

    return Filled(_BLOCK.sub(replace, page), tuple(names), tuple(missing))


def tables_of(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The tables of a JSON file; rows of two columns are one, too."""
    if "tables" in content:
        tables: Sequence[Mapping[str, Any]] = content["tables"]
        return tables
    return [{"title": content["title"], "columns": ("what", "figure"), "lines": list(content["rows"].items())}]


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """One table under its title; columns without any value are left out."""
    kept = [at for at in range(len(columns)) if at == 0 or any(line[at] is not None for line in lines)]
    rows = [[columns[at].strip() for at in kept], ["---" if at == 0 else "---:" for at in kept]]
    rows += [[shown(line[at]) for at in kept] for line in lines]
    drawn = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return f"**{title}**\n\n{drawn}\n"


def _block(content: Mapping[str, Any], number: int | None) -> str:
    """The tables of a file, or its Nth alone, then how they were made."""
    tables = tables_of(content)
    wanted = tables if number is None else tables[number - 1 : number]
    parts = [table(found["title"], found["columns"], found["lines"]) for found in wanted]
    parts.append(f"{content.get('note', '')} `{content['command']}`, {_machine(content['machine'])}.".strip() + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    amx = "with AMX" if machine["amx"] else "without AMX"
    return f"{machine['cores']} cores of {machine['processor']} {amx}"
