"""vLLM with the fused adapter against Hugging Face with the dense ΔW, both in float32, for every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.recipe import FusionMethod, FusionRecipe, Term
from bank.manifest import read_manifest
from bank.matrix import open_matrix
from bench.oracle.dense import dense_adapter, token_logprobs
from bench.rig.engine import running_engine
from bench.rig.tiny import tiny_bank

TOLERANCE = 1e-3
PROMPTS = ["Write a line about the sea.", "two\nlines", "A much longer question, to cross a block boundary. " * 3]
CASES: list[tuple[bool, tuple[Term, ...]]] = [
    (False, (Term(2, 1000),)),
    (False, (Term(0, 571), Term(3, 429))),
    (True, ()),
    (True, (Term(1, 300), Term(2, 200))),
    (True, (Term(0, 100), Term(3, 900))),
]

SOME = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["tp1", "tp2"])
def test_engine_and_dense_model_give_the_same_log_probabilities(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, tensor_parallel: int
) -> None:
    """Two banks at once, of other modules and methods: an engine serves both while a fleet moves."""
    banks = [
        tiny_bank(tmp_path / m.value, tiny_model_folder, embedder_folder, method=m, scale=0.1, targets=targets)
        for m, targets in ((FusionMethod.CAT, SOME), (FusionMethod.SHARED, None))
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with running_engine(
        banks[0],
        tiny_model_folder,
        next_bank=banks[1],
        dtype="float32",
        max_loras=1,  # every recipe is written over the one before it
        tensor_parallel_size=tensor_parallel,
    ) as engine:
        tokens = [
            engine.client.post("/tokenize", json={"model": "base", "prompt": prompt}).json()["tokens"]
            for prompt in PROMPTS
        ]
        plain = torch.tensor(engine.prompt_logprobs("base", tokens[0]))
        torch.testing.assert_close(plain, token_logprobs(model, tokens[0]), atol=TOLERANCE, rtol=0)
        for bank in banks:
            manifest = read_manifest(bank)
            matrix = open_matrix(bank, manifest)
            for common, terms in CASES:
                recipe = FusionRecipe(manifest.short, manifest.method, common, terms)
                with dense_adapter(model, matrix, recipe):
                    wanted = [token_logprobs(model, ids) for ids in tokens]
                for ids, expected in zip(tokens, wanted, strict=True):
                    served = torch.tensor(engine.prompt_logprobs(recipe.name, ids))
                    torch.testing.assert_close(
                        served, expected, atol=TOLERANCE, rtol=0, msg=lambda m, r=recipe: f"{r.name}: {m}"
                    )
                assert (wanted[0] - plain).abs().max() > 10 * TOLERANCE, f"{recipe.name} changes nothing"
