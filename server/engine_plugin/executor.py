"""One worker, inside the engine core's own process: how a CPU serves at tensor-parallel size 1.

For CPUs vLLM starts the worker as a second process and lets both poll a shared buffer, each in a loop of
`sched_yield`, while the other computes. On a machine of few cores those two loops starve everything else: clients,
the API process, even kernel threads were seen to wait for seconds. In one process nothing polls, a step costs no
round trip, and every core is free for the model.
"""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's single-process executor under another name: by its own, the CPU platform replaces it."""
