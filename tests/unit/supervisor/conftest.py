"""A data folder of `mta up`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.supervisor.data_folder import DataFolder


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder.open(tmp_path / "data")
    yield folder
    folder.close()
