"""`python -m server.engine`: run vLLM's OpenAI server."""

from __future__ import annotations

import os

from bank.models.process_startup import heavy_imports, run_and_exit, without_audio

without_audio()  # also in the processes that vLLM spawns, which import this module

if __name__ == "__main__":
    # vLLM imports this module to patch it, which would load the compiler, a fifth of all modules (`command.py`).
    unused = ("torch._inductor.lowering",) if os.environ.get("TORCHDYNAMO_DISABLE") == "1" else ()
    with heavy_imports(*unused):
        from vllm.entrypoints.launchers.api_server.entry import main
        from vllm.v1.engine import async_llm, core  # noqa: F401  importing these in `main` would be slower

    run_and_exit(main)
