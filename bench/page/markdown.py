"""Render figures as Markdown, and fill the blocks of a page with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.page.report import shown

_BLOCK = re.compile(r"(?P<open><!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Filled:
    """A filled page, and the names of the results that were used and that are missing."""

    text: str
    names: tuple[str, ...]
    missing: tuple[str, ...]


def fill(page: str, results: Mapping[str, Mapping[str, Any]], pictures: Mapping[str, str] | None = None) -> Filled:
    """Replace the content of every block whose results exist; `pictures` has their links, by the same names."""
    names, missing = dict[str, None](), dict[str, None]()

    def replace(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in results:
            missing[name] = None
            return block[0]
        names[name] = None
        tables = _block(results[name])
        picture = (pictures or {}).get(name)
        drawn = f"![{results[name]['bench']}]({picture})\n\n" if picture else ""
        return f"{block['open']}{tables}{drawn}{block['close']}"

    return Filled(_BLOCK.sub(replace, page), tuple(names), tuple(missing))


def tables_of(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the tables of a JSON file; a two-column report counts as one table."""
    if "tables" in content:
        tables: Sequence[Mapping[str, Any]] = content["tables"]
        return tables
    return [{"title": content["title"], "columns": ("what", "figure"), "lines": list(content["rows"].items())}]


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Render one table under its title, without empty columns."""
    kept = [at for at in range(len(columns)) if at == 0 or any(line[at] is not None for line in lines)]
    rows = [[columns[at].strip() for at in kept], ["---" if at == 0 else "---:" for at in kept]]
    rows += [[shown(line[at]) for at in kept] for line in lines]
    drawn = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return f"**{title}**\n\n{drawn}\n"


def _block(content: Mapping[str, Any]) -> str:
    """Render the tables of a file, followed by the command and the machine."""
    parts = [table(found["title"], found["columns"], found["lines"]) for found in tables_of(content)]
    parts.append(f"{content.get('note', '')} `{content['command']}`, {_machine(content['machine'])}.".strip() + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    amx = "with AMX" if machine["amx"] else "without AMX"
    return ", ".join([*machine.get("gpus", ()), f"{machine['cores']} cores of {machine['processor']} {amx}"])
