"""The console's files as they are served: small, vendored as fetched, with nothing inline and nobody else's address."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from server.gateway.routes import console

ROOT = Path(console.__file__).parent
STATIC = ROOT / "static"
MOST_BYTES = 150_000
OWN = [path for path in sorted(STATIC.rglob("*")) if path.is_file() and "vendor" not in path.parts]
MODULES = sorted(STATIC.rglob("*.js"))
_IMPORT = re.compile(r"""(?:\bfrom\s?|\bimport\()['"]([^'"\s]+)['"]""")


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in STATIC.rglob("*") if path.is_file()) < MOST_BYTES


def test_what_is_vendored_is_what_the_hashes_say() -> None:
    lines = (ROOT / "vendored.sha256").read_text("utf-8").splitlines()
    said = {name: digest for digest, name in (line.split() for line in lines)}
    files = {path for folder in ("static/vendor", "licences") for path in (ROOT / folder).iterdir()}
    assert said == {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_page_has_nothing_inline() -> None:
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\bstyle=|\bon\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.S) == [""]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_import_files_that_are_there(path: Path) -> None:
    for name in _IMPORT.findall(path.read_text("utf-8")):
        assert name.startswith("."), name
        assert (path.parent / name).is_file(), name


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_names_anybody_else_or_writes_markup(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
