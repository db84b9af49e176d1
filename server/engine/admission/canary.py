"""The canary: before an engine is ready, its adapters must move a few tokens as they did when the bank was built."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
from vllm import SamplingParams

from adapters.recipe import FORMAT
from bank.agreement import agreements, bound_of
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.manifest import BASE, BankManifest, Canary
from server.engine.admission.prepare import AdapterNames
from server.engine_protocol import SHARED

log = logging.getLogger("vllm.mta")  # as all loggers in here, below the one that has vLLM's handler


async def check_canary(engine: Any, names: AdapterNames, manifest: BankManifest, dtype: str) -> None:
    """Read the bank's canary with each of its adapters; raise BankError if one does not act as in training."""
    if (canary := manifest.canary) is None:
        log.warning("bank %s has no canary: `mta verify` tells whether its adapters act as in training", manifest.short)
        return
    prefix = f"{FORMAT}:{manifest.short}:{manifest.method.value}"
    read = await asyncio.gather(*(_read(engine, names, canary, prefix, terms) for terms in canary.read))
    trained = {terms: np.array(read) for terms, read in canary.read.items()}
    bound = bound_of({dtype, manifest.training.get("dtype")})
    for terms, how in agreements(dict(zip(trained, read, strict=True)), trained, bound).items():
        if not how.within:
            raise BankError(
                f"adapters do not act as in training: with {terms} of bank {manifest.short} a text's log-probabilities "
                f"are not those of its build, {how}. `mta doctor` checks the installed packages; if another release "
                "built the bank, build it again. MTA_CANARY=false starts the engine all the same"
            )


async def _read(engine: Any, names: AdapterNames, canary: Canary, prefix: str, terms: str) -> Vectors:
    """Return the log-probabilities of the canary's tokens, by the engine's own way of a request."""
    name, prompt = f"{prefix}:{terms}", {"prompt_token_ids": list(canary.ids)}
    arguments = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "extra_args": {SHARED: canary.shared}}
    lora = None if terms == BASE else names.lease(name)
    outputs = engine.generate(prompt, SamplingParams(**arguments), f"canary-{name}", lora_request=lora)
    *_, last = [output async for output in outputs]
    if lora:
        names.release(name)
    tokens = list(zip(last.prompt_logprobs, canary.ids, strict=True))[canary.read_from :]
    return np.array([logprobs[token].logprob for logprobs, token in tokens])
