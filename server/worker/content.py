"""Tells faults of a job's content from faults of the process that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import MtaError, TrainingError

CONFIG_REMEDY = "submit the job again"
SAMPLE_REMEDY = "send it as the model's chat template requires, or leave it out"
_MOST_CHARS = 300


@contextmanager
def blamed(what: str, remedy: str) -> Iterator[None]:
    """Blame the content for whatever goes wrong in a block, except for a lack of memory, which is the process's fault.

    For code that only reads and encodes, and touches no device.

    Args:
        what: the content that the block reads, e.g. `samples.3`.
        remedy: what the client can do about it.

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
