"""Our kernel compiles for GPUs: Triton's own compiler is at hand without one."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

INTERPRETED = False
POINTERS = {"table": "*i64", "rows": "*bf16", "chosen": "*i64", "weights": "*fp32"}


@pytest.mark.parametrize(("capability", "slots"), [(80, "*bf16"), (90, "*bf16"), (90, "*fp16")])
def test_a_thread_loads_eight_numbers_of_a_row_at_once(capability: int, slots: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from server.engine.gpu.kernel import BLOCK, MAX_STEP, _write

    types = {name: POINTERS.get(name, "i32") for name in _write.arg_names}
    types |= {"like": slots, "STEP": "constexpr", "BLOCK": "constexpr"}
    aligned = {(_write.arg_names.index("rows"),): [["tt.divisibility", 16]]}
    source = ASTSource(_write, types, constexprs={"STEP": MAX_STEP, "BLOCK": BLOCK}, attrs=aligned)
    compiled = compile(source, GPUTarget("cuda", capability, 32)).asm
    assert compiled["cubin"]
    assert "ld.global.v4.b32" in compiled["ptx"]
