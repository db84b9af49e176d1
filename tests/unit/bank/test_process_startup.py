"""Heavy imports: garbage is collected again after them, and transformers does not load what it need not."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import gc, sys
from bank.models.process_startup import heavy_imports
try:
    with heavy_imports("wave"):
        print(gc.isenabled())
        try:
            import wave
        except ImportError:
            print("later")
        from transformers.generation import candidate_generator
        raise KeyError
except KeyError:
    import wave
    print(wave.__name__, gc.isenabled(), gc.get_freeze_count() > 0)
    print(any(name.partition(".")[0] in ("sklearn", "scipy") and sys.modules[name] for name in sys.modules))
"""


def test_garbage_is_collected_again_and_what_nobody_uses_is_left_out() -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["False", "later", "wave", "True", "True", "False"], ran.stderr
