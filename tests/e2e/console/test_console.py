"""The console in a real browser, over the demo's bank and a real engine.

Its tests stand in a file for each page and are gathered here: tests of one file run in one process, one after the
other, so that one server and one browser are enough for all.
"""

from __future__ import annotations

import pytest

from tests.e2e.console.adapt import TestAdapt
from tests.e2e.console.bank import TestBank
from tests.e2e.console.everywhere import TestEverywhere
from tests.e2e.console.playground import TestPlayground, TestStrength
from tests.e2e.console.reading import TestReading
from tests.e2e.console.system import TestSystem
from tests.e2e.console.trouble import TestTrouble
from tests.e2e.console.users import TestUsers

pytestmark = pytest.mark.timeout(1200)  # the first one may have to build the demo's bank

__all__ = [
    "TestAdapt",
    "TestBank",
    "TestEverywhere",
    "TestPlayground",
    "TestReading",
    "TestStrength",
    "TestSystem",
    "TestTrouble",
    "TestUsers",
]
