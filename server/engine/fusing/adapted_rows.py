"""LoRA on CPU for the rows that have an adapter, and for no others.

vLLM marks a row without an adapter with slot -1. Its CPU wrapper takes that for an index: as soon as one row of the
step has an adapter, it adds whatever is in the last slot to the base model's rows. Here the rows that have an adapter
are picked once per step, and vLLM's own operators see nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from bank.errors import BankError

KNOWN_OPERATIONS = frozenset(
    {
        "add_shrink",
        "add_expand",
        "add_lora_linear",
        "add_lora_embedding",
        "add_lora_logits",
        "apply_lora_full_linear",  # skips rows without an adapter on its own
    }
)
"""The operations that vLLM's wrapper is known to have; any other could touch rows that it must not."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step that have an adapter.

    Attributes:
        slots: the slot of each row [n].
        places: their indices among all rows [n]; None where every row has an adapter.
    """

    slots: torch.Tensor
    places: torch.Tensor | None

    @classmethod
    def among(cls, slots: torch.Tensor) -> Rows:
        """Pick them from the slots of all rows; -1 is no adapter."""
        places = (slots >= 0).nonzero().flatten()
        return cls(slots.clone(), None) if len(places) == len(slots) else cls(slots[places], places)

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of a matrix; the matrix itself where every row has an adapter."""
        return rows if self.places is None else rows[self.places]

    def put(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """The inverse of `of`."""
        if self.places is not None:
            into[self.places] = rows


class AdaptedRows(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's wrapper for CPUs, confined to rows that have an adapter; arguments as in vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        none = torch.empty(0, dtype=torch.long, device=self.device)
        self._tokens = self._samples = Rows(none, none)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Note the slots of a step's rows."""
        super().update_metadata(*args, **kwargs)
        self._tokens, self._samples = Rows.among(self.token_lora_indices), Rows.among(self.sampler_indices)

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **_: Any
    ) -> None:
        """y[i] = x A[i]ᵀ · scale."""
        if not self._tokens:
            return
        ours = self._tokens.of(_flat(x))
        for slice_y, a in zip(y, lora_a_stacked, strict=False):
            part = self._tokens.of(_flat(slice_y))
            bgmv_shrink(ours, a, part, self._tokens.slots, scale)
            self._tokens.put(part, _flat(slice_y))

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        *,
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """y[:, slice i] += x[i] B[i]ᵀ."""
        if not self._tokens:
            return
        part = self._tokens.of(_flat(y))
        for slice_x, b, size in zip(x, lora_b_stacked, output_slices, strict=False):
            ours = self._tokens.of(_flat(slice_x))
            bgmv_expand_slice(ours, b, part, self._tokens.slots, offset_start, size, add_inputs)
            offset_start += size
        self._tokens.put(part, _flat(y))

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> None:
        """Shrink and expand; no buffer is made where no row has an adapter."""
        if self._tokens:
            super().add_lora_linear(*args, **kwargs)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """y += x Bᵀ."""
        if not self._tokens:
            return
        part = self._tokens.of(_flat(y))
        bgmv_expand(self._tokens.of(_flat(x)), lora_b_stacked, part, self._tokens.slots, add_inputs)
        self._tokens.put(part, _flat(y))

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> None:
        """y += x Aᵀ Bᵀ · scale, for the rows that are sampled from."""
        if not self._samples:
            return
        part, ours = self._samples.of(_flat(y)), self._samples.of(_flat(x))
        low = torch.zeros(len(ours), lora_b_stacked.size(-1), dtype=torch.float32, device=ours.device)
        bgmv_shrink(ours, lora_a_stacked, low, self._samples.slots, scale)
        bgmv_expand(low, lora_b_stacked, part, self._samples.slots, add_inputs=True)
        self._samples.put(part, _flat(y))


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, rows.shape[-1])


def install() -> None:
    """Have CPUs use `AdaptedRows`; elsewhere vLLM's kernels skip rows without an adapter on their own.

    Raises:
        BankError: see `check_wrapper`.
    """
    if current_platform.is_cpu():
        check_wrapper()
        type(current_platform).get_punica_wrapper = classmethod(lambda platform: f"{__name__}.{AdaptedRows.__name__}")


def check_in_use(wrappers: Iterable[object]) -> None:
    """Make sure that a CPU's model runs with `AdaptedRows`.

    Raises:
        BankError: when vLLM chose another class.
    """
    others = sorted({type(wrapper).__name__ for wrapper in wrappers if not isinstance(wrapper, AdaptedRows)})
    if current_platform.is_cpu() and others:
        raise BankError(f"LoRA would run on {', '.join(others)}, which gives rows each other's adapters: not served")


def check_wrapper(wrapper: type[PunicaWrapperCPU] = AdaptedRows) -> None:
    """Try every operation on a step of rows with and without adapters.

    Raises:
        BankError: when this vLLM would serve a row with an adapter that is not its own.
    """
    public = {name for name in vars(PunicaWrapperCPU) if not name.startswith("_")}
    if public != KNOWN_OPERATIONS:
        raise BankError(
            f"this vLLM's PunicaWrapperCPU differs in {sorted(public ^ KNOWN_OPERATIONS)} from the one known to keep "
            "adapters apart: install the version of vLLM that mta-server requires"
        )
    try:
        wrong = [name for name, good in _trial(wrapper).items() if not good]
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise BankError(f"this vLLM's LoRA operators for CPUs are not the ones the plugin knows: {error}") from error
    if wrong:
        raise BankError(f"{', '.join(wrong)} of this vLLM would give rows each other's adapters: it must not serve")


def _trial(wrapper_class: type[PunicaWrapperCPU]) -> dict[str, bool]:
    """Whether each operation leaves rows without an adapter as they are and gives the others their own."""
    numbers = torch.Generator().manual_seed(0)
    owners, slots = (0, 1, 0, 2, 0), (None, 0, None, 1, None)  # adapter ids (0: none) and their slots
    x, y, a, b = (torch.randn(*shape, generator=numbers) for shape in ((5, 4), (5, 6), (2, 1, 3, 4), (2, 1, 6, 3)))
    low, wanted = torch.ones(5, 3), y.clone()
    for row, slot in enumerate(slots):
        if slot is not None:
            low[row] = a[slot, 0] @ x[row]
            wanted[row] += b[slot, 0] @ low[row]
    wrapper = wrapper_class(8, max_batches=8, device=torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(owners, owners, is_prefill=True), [1, 2], 3, 16)
    linear, embedding, logits = y.clone(), y.clone(), y.clone()
    wrapper.add_lora_linear(linear, x, (a,), (b,), 1.0, (6,))
    wrapper.add_lora_embedding(embedding, low, b)
    wrapper.add_lora_logits(logits, x, a, b, 1.0)
    answers = {"add_lora_linear": linear, "add_lora_embedding": embedding, "add_lora_logits": logits}
    return {name: torch.allclose(answer, wanted, atol=1e-5) for name, answer in answers.items()}
