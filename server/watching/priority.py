"""Work that lets answers go first, where it shares a machine's cores with them."""

from __future__ import annotations

import os
import threading

NICENESS = 10
"""Gets about a tenth of a core that something else wants."""


def stand_back() -> None:
    """Have the scheduler prefer whatever else runs to this thread, and to those that it starts from now on."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
