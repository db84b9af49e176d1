"""A release: its version is the same everywhere, and its notes are the changelog's."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from adapters.errors import MtaError
from deploy.release import NAMES, ROOT, check_names, notes_of

CHANGES = """# Changelog

## [Unreleased]
{}
## [0.2.0] - 2026-12-03

### Added

- A.

## [0.1.0] - 2026-11-01

- B.
"""


def test_every_file_names_the_version() -> None:
    check_names(ROOT, tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"])


@pytest.mark.parametrize("file", NAMES)
def test_a_file_that_names_another_version_is_named(file: str, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        number = "0.1.9" if name == file else "0.2.0"
        (tmp_path / name).write_text(f'"version": "{number}" newTag: "{number}"')
    with pytest.raises(MtaError, match=f"{file} names version 0.1.9"):
        check_names(tmp_path, "0.2.0")


def test_the_notes_are_a_versions_own() -> None:
    assert notes_of(CHANGES.format(""), "0.2.0") == "### Added\n\n- A.\n"
    assert notes_of(CHANGES.format(""), "0.1.0") == "- B.\n"


@pytest.mark.parametrize(
    ("unreleased", "version", "message"), [("- C.", "0.2.0", "unreleased"), ("", "0.3.0", "nothing of 0.3.0")]
)
def test_a_release_without_notes_is_refused(unreleased: str, version: str, message: str) -> None:
    with pytest.raises(MtaError, match=message):
        notes_of(CHANGES.format(unreleased), version)
