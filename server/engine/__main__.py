"""`python -m server.engine`: vLLM's own OpenAI server."""

from __future__ import annotations

from bank.models.imports import heavy_imports

if __name__ == "__main__":
    with heavy_imports():
        from vllm.entrypoints.launchers.api_server.entry import main
        from vllm.v1.engine import async_llm, core  # noqa: F401  `main` would import them, more slowly

    main()
