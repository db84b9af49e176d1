"""The console in a real browser, over the demo's bank and a real engine.

Its tests stand in files beside this one and are gathered here: tests of one file run in one process, one after the
other, so that one server and one browser are enough for all.
"""

import pytest

from tests.e2e.console.everywhere import TestEverywhere, TestReading, TestTrouble  # noqa: F401
from tests.e2e.console.pages import TestAdapt, TestBank, TestSystem, TestUsers  # noqa: F401
from tests.e2e.console.playground import TestPlayground, TestStrength  # noqa: F401

pytestmark = pytest.mark.timeout(1200)  # the first one may have to build the demo's bank
