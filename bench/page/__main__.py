"""Fill a page with tables and pictures from the JSON files of the other benchmarks, so that nobody types a figure.

The block between `<!-- figures: NAME -->` and `<!-- end of figures -->` is replaced by the tables of `NAME.json` and
their picture. If there is no such file, the block stays as it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import MtaError
from bench import script
from bench.page.markdown import fill
from bench.page.pictures import draw
from bench.page.report import console


def main(
    *,
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.", file_okay=False)] = Path("out/bench"),
    page: Annotated[Path, typer.Option(help="The page to fill.", dir_okay=False)] = Path("docs/performance.md"),
) -> None:
    """Fill a page with the tables of JSON files, and draw their pictures beside it."""
    known = read_results(results)
    if not page.is_file():
        raise MtaError(f"there is no page at {page}: --page names one, docs/performance.md in a checkout")
    drawn = draw(known, page.parent / "pictures")
    links = {name: os.path.relpath(path, page.parent) for name, path in drawn.items()}
    filled = fill(page.read_text("utf-8"), known, links)
    page.write_text(filled.text, "utf-8")
    said = console()
    said.print(f"{page}: filled {', '.join(filled.names) or 'nothing'}")
    said.print(f"pictures: {', '.join(str(path) for path in drawn.values()) or 'none'}")
    for name in filled.missing:
        said.print(f"not there: {results / name}.json")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the benchmarks' JSON files from a folder, by name without `.json`.

    Raises:
        MtaError: if there is none, or one cannot be read.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise MtaError(f"{path} is not JSON: {error}") from error
        if "bench" in content:
            results[path.stem] = content
    if not results:
        raise MtaError(f"no results at {folder}: `mta bench cost` and the others write them (--out)")
    return results


if __name__ == "__main__":
    script(main)
