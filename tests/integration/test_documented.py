"""Every code block of the pages that show how to use the server, as somebody would try them who reads a page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bank.peft.exported import export_anchor
from bench.rig.up import Up, up
from mta_client import Client
from tests.support.documented import ROOT, Reader, blocks_of

PAGES = (
    "README.md",
    "docs/api.md",
    "docs/banks.md",
    "docs/deploying.md",
    "docs/openai.md",
    "docs/scaling.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/adopting/*.md")),
)
PICTURES = {"mermaid"}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def settings(tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path) -> dict[str, str]:
    folders = {"MTA_BANK": tiny_bank_folder, "MTA_MODEL": tiny_model_folder, "MTA_EMBEDDER": embedder_folder}
    others = {"MTA_USER_HEADERS": "X-User-ID,X-OpenWebUI-User-Id", "MTA_DEFAULT_MAX_TOKENS": "32"}  # a random model's
    return {name: str(folder) for name, folder in folders.items()} | others


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]) -> Iterator[Up]:
    with up(tmp_path_factory.mktemp("documented"), environment=settings) as started:
        yield started


@pytest.fixture
def reader(server: Up, settings: dict[str, str], tiny_bank_folder: Path, tmp_path: Path) -> Reader:
    """Somebody who has adapters of their own, as PEFT folders; rosa is known, as the README's first lines leave her."""
    with Client(server.url) as client:
        client.put_profile("rosa", ["Dear friend,\nThe first roses are open along the south wall."])
    for anchor, name in (("a00", "ana"), ("a01", "ben")):
        export_anchor(tiny_bank_folder, anchor, tmp_path / "adapters" / name)
    return Reader(server.url, tmp_path, settings)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, reader: Reader) -> None:
    for block in blocks_of(page):
        if block.reason is None and block.language not in PICTURES:
            try:
                reader.try_block(block)
            except Exception as error:
                error.add_note(f"in the block at {page}:{block.line}")
                raise


def test_links_lead_to_pages_and_headings() -> None:
    pages = {path: path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
    broken = []
    for page, text in pages.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCED.sub("", text)):
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (heading and heading not in headings(pages[file])):
                broken.append((page.name, target))
    assert not broken


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    config, environment = ROOT / "deploy/site/mkdocs.yml", {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = (sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(config), "-d", str(tmp_path))
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    reference = (tmp_path / "reference/index.html").read_text("utf-8")
    assert "/users/{user_id}/adapt" in reference


def headings(page: str) -> set[str]:
    """The names that a page's headings have in links."""
    found = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("page", PAGES[1:])
def test_no_code_hides_from_being_run(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert blocks_of(page)
    assert text.count("```") == 2 * len(blocks_of(page)), "a fence within a list is not found"
    prose = FENCED.sub("", text)
    assert not re.search(r"^\n {4}\S", prose, re.MULTILINE), "code by indentation is not found"
