"""Making sure, before anything is served, that this vLLM's LoRA on CPU keeps adapters apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from bank.errors import BankError
from server.engine.fusing.kernels.wrapper import CpuLoRA

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


def install() -> None:
    """Have CPUs use `CpuLoRA`; elsewhere vLLM's kernels skip rows without an adapter on their own.

    Raises:
        BankError: see `check_wrapper`.
    """
    if current_platform.is_cpu():
        check_wrapper()
        name = f"{CpuLoRA.__module__}.{CpuLoRA.__name__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda platform: name)


def check_in_use(wrappers: Iterable[object]) -> None:
    """Make sure that a CPU's model runs with `CpuLoRA`.

    Raises:
        BankError: when vLLM chose another class.
    """
    others = sorted({type(wrapper).__name__ for wrapper in wrappers if not isinstance(wrapper, CpuLoRA)})
    if current_platform.is_cpu() and others:
        raise BankError(f"LoRA would run on {', '.join(others)}, which gives rows each other's adapters: not served")


def check_wrapper(wrapper: type[PunicaWrapperCPU] = CpuLoRA) -> None:
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
