"""Heavy imports: garbage is collected again after them, and transformers does not load scikit-learn."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import gc, sys
from bank.models.imports import heavy_imports
try:
    with heavy_imports():
        print(gc.isenabled())
        from transformers.generation import candidate_generator
        raise KeyError
except KeyError:
    print(gc.isenabled(), any(name.startswith("sklearn.") for name in sys.modules), gc.get_freeze_count() > 0)
"""


def test_garbage_is_collected_again_and_scikit_learn_is_left_out() -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["False", "True", "False", "True"], ran.stderr
