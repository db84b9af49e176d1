"""Where the line runs between a job's content and the process that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import MtaError, TrainingError

CONFIG_REMEDY = "ask for the job again"
SAMPLE_REMEDY = "send it as the model's chat template wants it, or leave it out"
_MOST_CHARS = 300


@contextmanager
def blamed(what: str, remedy: str) -> Iterator[None]:
    """Hold what was sent to blame for whatever goes wrong in a block; only a want of memory is the process's own.

    For what reads and encodes, and touches no device.

    Args:
        what: is read in the block, and where it stands: `samples.3`.
        remedy: what a person can do about it.

    Raises:
        TrainingError: with the reason.
    """
    try:
        yield
    except (MtaError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_MOST_CHARS]
        raise TrainingError(f"{what} cannot be used ({reason}): {remedy}") from error
