"""Calibration of predicted gains, on numbers whose slope and offsets are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bank.building import calibration
from bank.building.calibration import calibrate, calibrate_signer
from bank.building.resume import Workbench
from bank.items.histories import History
from bank.items.profile import Item, Vectors
from bank.items.tasks import get_task
from bank.lookup.signature import Signature, predicted_gains

ANCHORS, DRAWS = 5, 40


def draws(slope: float, offsets: np.ndarray, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    predicted = chance.normal(size=(DRAWS, ANCHORS)).astype(np.float32)
    measured = slope * predicted - offsets + noise * chance.normal(size=predicted.shape)
    return predicted, measured.astype(np.float32)


def test_slope_and_offsets_are_found_again() -> None:
    offsets = np.array([0.0, 0.1, -0.2, 0.5, 2.0])
    found = calibrate(*draws(0.4, offsets, noise=0.01))
    assert found.slope == pytest.approx(0.4, abs=0.01)
    np.testing.assert_allclose(found.offsets, offsets, atol=0.02)
    assert found.correlation > 0.99
    assert found.draws == DRAWS


def test_without_offsets_the_most_extreme_anchor_would_win() -> None:
    """It is predicted to help the most and harms everybody."""
    offsets = np.array([0.0, 0.0, 0.0, 0.0, 3.0])
    predicted, measured = draws(0.4, offsets)
    predicted[:, 4] *= 5
    measured[:, 4] = 0.4 * predicted[:, 4] - 3.0
    found = calibrate(predicted, measured)
    right = measured.argmax(1)
    assert np.mean((found.slope * predicted - found.offsets).argmax(1) == right) == 1.0
    assert np.mean(predicted.argmax(1) == right) < 1.0


def test_evidence_that_speaks_against_itself_is_none() -> None:
    assert calibrate(*draws(-0.4, np.zeros(ANCHORS))).slope == 0.0


def test_a_calibrated_gain_is_slope_times_product_less_offset() -> None:
    products, offsets = np.array([1.0, -2.0], np.float32), np.array([0.0, 0.5], np.float32)
    np.testing.assert_allclose(predicted_gains(Signature("00000000", 10, products), 0.5, offsets), [0.5, -1.5])


class FailingSigner:
    """Says something of so many draws, then is killed."""

    def __init__(self, draws: int) -> None:
        self._left = draws

    def products(self, examples: object) -> Vectors:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return np.arange(ANCHORS, dtype=np.float32)

    measured_gains = staticmethod(lambda examples: np.arange(ANCHORS, dtype=np.float32))


def test_draws_of_a_killed_run_are_not_repeated_and_count_as_done_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "encode_pair", lambda *_: None)
    items = tuple(Item(str(i), {"input": f"say {i}", "output": str(i)}) for i in range(12))
    people = [History(name, items) for name in ("one", "two")]

    def calibrated(signer: Any, told: list[int]) -> None:
        calibrate_signer(
            signer, people, get_task("chat"), None, Workbench(tmp_path),  # type: ignore[arg-type]
            max_tokens=8, seed=0, on_draw=lambda done, of: told.append(done),
        )  # fmt: skip

    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        calibrated(FailingSigner(3), first)
    second: list[int] = []
    calibrated(FailingSigner(5), second)
    assert (first, second) == ([0, 1, 2, 3], [3, 4, 5, 6, 7, 8])
