"""Compiling the CPU kernel: once, into the cache folder, and what happens where that is not possible."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from server.engine.fusing.kernels import native
from server.settings import Settings


def test_it_compiles_here_and_is_what_runs() -> None:
    cache_dir = Settings().cache_dir
    assert native.build(cache_dir), "no C++ compiler: personal answers are slow here, and tests miss the kernel"
    assert native.kernels(cache_dir) is not None


def test_what_is_there_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(native, "_compile", lambda folder: pytest.fail("compiled again"))
    assert native.build(tmp_path)


def test_another_source_or_another_pytorch_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = native.library_path(tmp_path)
    monkeypatch.setattr(native, "version", lambda package: "0.0")
    other = native.library_path(tmp_path)
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[:1])
    assert len({here, other, native.library_path(tmp_path)}) == 3


@pytest.mark.parametrize("reason", ["no compiler", "a compiler that fails"])
def test_without_it_the_reason_is_logged_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def fail(folder: str) -> None:
        raise RuntimeError(f"Error building extension in {folder}")

    monkeypatch.setattr(native.shutil, "which", lambda name: None if reason == "no compiler" else f"/bin/{name}")
    monkeypatch.setattr(native, "_compile", fail)
    with caplog.at_level(logging.WARNING, "mta.engine"):
        assert not native.build(tmp_path)
    assert ("install g++" if reason == "no compiler" else "Error building extension") in caplog.text
    assert not list(tmp_path.rglob("*.so"))
