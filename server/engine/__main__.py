"""`python -m server.engine`: run vLLM's OpenAI server."""

from __future__ import annotations

import os

from bank.models.process_startup import heavy_imports, run_and_exit

COMPILER = "torch._inductor.lowering"
"""Module that vLLM patches when it is imported; importing it loads the compiler, a fifth of all modules."""

if __name__ == "__main__":
    compiles = os.environ.get("TORCHDYNAMO_DISABLE") != "1"  # `command.py`
    with heavy_imports(*(() if compiles else (COMPILER,))):
        from vllm.entrypoints.launchers.api_server.entry import main
        from vllm.v1.engine import async_llm, core  # noqa: F401  importing these in `main` would be slower

    run_and_exit(main)
