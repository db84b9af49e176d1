"""The demo's bank is built once, and again only when it is no longer what would be built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.demo import bank as demo_bank

PEOPLE = [{"user_id": "one", "profile": []}]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tiny_bank_folder: Path) -> list[Path]:
    """The folders that were built; training is not what is tested here, so each becomes a copy of a tiny bank."""
    built: list[Path] = []

    def build(users_file: Path, anchors: int, folder: Path) -> None:
        shutil.copytree(tiny_bank_folder, folder)
        built.append(folder)

    monkeypatch.setattr(demo_bank, "_build", build)
    return built


def test_a_finished_bank_is_not_built_again(builds: list[Path], tmp_path: Path) -> None:
    first, second = demo_bank.ensure_bank(PEOPLE, tmp_path), demo_bank.ensure_bank(PEOPLE, tmp_path)
    assert builds == [first[0]]
    assert (first[1], second[1]) == (True, False)
    assert first[0] == second[0]


def test_other_people_make_another_bank_and_the_stale_one_goes(builds: list[Path], tmp_path: Path) -> None:
    stale, _ = demo_bank.ensure_bank(PEOPLE, tmp_path)
    fresh, built = demo_bank.ensure_bank([*PEOPLE, {"user_id": "two", "profile": []}], tmp_path)
    assert built
    assert fresh.is_dir()
    assert not stale.exists()


def test_other_options_make_another_bank(builds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = demo_bank.ensure_bank(PEOPLE, tmp_path)
    monkeypatch.setattr(demo_bank, "BUILD_OPTIONS", (*demo_bank.BUILD_OPTIONS, "--rank", "4"))
    second, built = demo_bank.ensure_bank(PEOPLE, tmp_path)
    assert built
    assert first != second


def test_a_damaged_bank_is_built_again(builds: list[Path], tmp_path: Path) -> None:
    folder, _ = demo_bank.ensure_bank(PEOPLE, tmp_path)
    matrix = folder / "meta_loras.safetensors"
    content = bytearray(matrix.read_bytes())
    content[-1] ^= 1
    matrix.write_bytes(content)
    assert demo_bank.ensure_bank(PEOPLE, tmp_path) == (folder, True)
    assert builds == [folder, folder]


def test_what_an_interrupted_build_left_is_kept_for_the_next(builds: list[Path], tmp_path: Path) -> None:
    folder, _ = demo_bank.ensure_bank(PEOPLE, tmp_path)
    (folder / "bank.json").unlink()
    with pytest.raises(FileExistsError):  # the stand-in for `mta bank build` finds the folder still there
        demo_bank.ensure_bank(PEOPLE, tmp_path)
