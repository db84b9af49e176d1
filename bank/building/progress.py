"""What a build tells about its progress; without torch, since commands of the gateway's image show progress as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.training.trainer import StepReport


class RowProgress:
    """Receives the progress of a build; this class shows nothing."""

    def say(self, text: str) -> None:
        """Show a message."""

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        """Start training the rows, in this order; the values are approximate numbers of token ids to read."""

    def step(self, row: str, steps: int, report: StepReport) -> None:
        """Show that a training step is done."""

    def piece(self, what: str, done: int, of: int) -> None:
        """Show progress of other long work: called at its start and after each piece."""
