"""A stand-in for vLLM with our plugin: the same HTTP, no model, and knobs for what a real one does only by accident.

Its answer is words made from the model's name and the last message, so different recipes and prompts get different
texts. `tests/contract/test_engine.py` holds it and the real one to the same behaviour.
"""

from bench.rig.engine import KEY
from tests.support.fake_engine.knobs import Knobs, Seen
from tests.support.fake_engine.server import FakeEngine

__all__ = ["KEY", "FakeEngine", "Knobs", "Seen"]
