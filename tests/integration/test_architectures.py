"""Any base model: each architecture gets a bank, merged answers and a few-shot job, and vLLM serves what dense
formulas say, in float32. `make test` runs two of them, `make acceptance` all (`-m ""`)."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.errors import TrainingError
from adapters.recipe import FusionRecipe, Term, UserAdapterId, parse_recipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.loss import score
from adapters.user_adapter import UserAdapter, decode_user_adapter
from bank.items.prompt import encode_pair
from bank.models.folders import model_config
from bank.models.load import load_base
from bank.models.process_startup import cpu_flags
from bench.rig.engine import Engine, running_engine
from bench.rig.valkey import ValkeyProcess
from evaluation.scoring import EvalAdapter, OpenBank, Scorer
from server.engine.command import needs_amx
from server.store.jobs import JobState
from server.store.samples import Sample, encode_config
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer
from tests.support.architectures import ARCHITECTURES, WITHOUT_SYSTEM, tiny_of
from tests.support.bank_bench import Bench
from tests.support.dense import dense_adapter, token_logprobs
from tests.support.desk import Desk, desk_at
from tests.support.quantised import QUANTISATIONS, quantised

TOLERANCE = 1e-3  # largest difference in log-probability
ROUGH = 0.1  # mean difference of a quantised model, which vLLM computes in bfloat16 or with quantised inputs
COMMON = ("phi3", "olmo2")  # fused projections; and one that vLLM runs through transformers
EXAMPLES = [("Write a line about the sea.", "grey and wide"), ("two\nlines", "yes yes yes")]
JOB = encode_config(AdaptConfig(steps=8, learning_rate=0.02))
SYSTEM = {"role": "system", "content": "Be brief."}
CASES = (*ARCHITECTURES, *(f"llama+{quantisation}" for quantisation in QUANTISATIONS))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}  # for blocks of 128


def written(name: str, folder: Path) -> Path:
    """A model of this name."""
    architecture, _, quantisation = name.partition("+")
    return quantised(tiny_of(architecture, folder, **WIDE), quantisation) if quantisation else tiny_of(name, folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMMON else pytest.mark.acceptance) for name in CASES]
)
async def test_base_model_gets_a_bank_and_serves_merged_and_stacked(
    name: str, tmp_path: Path, embedder_folder: Path, store: ValkeyProcess
) -> None:
    folder, is_plain = written(name, tmp_path / "model"), name in ARCHITECTURES
    if needs_amx(model_config(folder).get("quantization_config", {})) and "amx_tile" not in cpu_flags():
        pytest.skip("needs a processor with AMX")
    manifest = Bench(tmp_path, folder, embedder_folder).build("bank", learning_rate=0.05)
    bank = OpenBank.open(tmp_path / "bank", manifest.embedder.id)
    trainer = AdapterTrainer.open(tmp_path / "bank", manifest, folder, "float32")
    async with desk_at(store.url, manifest) as desk:
        stacked, user = await adapted(desk, bank, trainer)
    merged = FusionRecipe(manifest.short, manifest.method, True, (Term(0, 500), Term(1, -300)))
    if is_plain:
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    else:
        dense, _ = load_base(folder, "float32")
    scorer, wanted, losses = Scorer(*load_base(folder, "float32")), {}, {}
    examples = [encode_pair(trainer.tokenizer, *pair, 512) for pair in EXAMPLES]
    ids = list(examples[0].ids)
    for recipe, model in (
        (merged, dense_adapter(dense, bank.matrix, merged)),
        (stacked, dense_adapter(dense, bank.matrix, stacked, user)),
    ):
        with model:
            wanted[recipe.name] = token_logprobs(dense, ids)
            losses[recipe.name] = [loss for loss, _ in score(dense, examples)]
        trained = user.weights if recipe is stacked else None
        read = scorer.read(EvalAdapter(bank, recipe.plain, trained), examples)
        assert [reading.loss for reading in read] == pytest.approx(losses[recipe.name], abs=TOLERANCE)
    settings = {"dtype": "float32" if is_plain else "bfloat16", "max_loras": 2, "redis_url": store.url}
    gap, tolerance, effect = (largest, TOLERANCE, 100 * TOLERANCE) if is_plain else (mean, ROUGH, 3 * ROUGH)
    with running_engine(tmp_path / "bank", folder, **settings) as engine:
        base = torch.tensor(engine.prompt_logprobs("base", ids))
        assert gap(base, token_logprobs(dense, ids)) < tolerance
        for served_as, expected in wanted.items():
            assert gap(torch.tensor(engine.prompt_logprobs(served_as, ids)), expected) < tolerance, served_as
            assert gap(expected, base) > effect, f"{served_as} changes nothing"
        if is_plain and ARCHITECTURES[name].template == WITHOUT_SYSTEM:
            a_system_message_is_refused_and_nothing_else(engine, trainer, merged)


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def mean(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


async def adapted(desk: Desk, bank: OpenBank, trainer: AdapterTrainer) -> tuple[FusionRecipe, UserAdapter]:
    """What a few-shot job of a new user leaves in the store."""
    worker = JobLoop(desk.jobs, desk.profiles, desk.feedback, desk.adapters, bank=bank.serving, trainer=trainer)
    job_id = await desk.submit(config=JOB)
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert job.state is JobState.SUCCEEDED, job
    key = job_id.user_key
    adapter_id = UserAdapterId(key, await desk.adapters.adapter_id(key) or "")
    stored = await desk.adapters.adapter(adapter_id)
    assert stored is not None
    user = decode_user_adapter(bank.manifest.layout, stored.raw)
    return parse_recipe(f"{stored.recipe}:u-{key}.{adapter_id.id}"), user


def a_system_message_is_refused_and_nothing_else(engine: Engine, trainer: AdapterTrainer, recipe: FusionRecipe) -> None:
    turn = {"role": "user", "content": "hello"}
    refused = engine.chat(recipe.name, messages=[SYSTEM, turn])
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert "System role not supported" in refused.text
    assert engine.chat(recipe.name, messages=[turn]).status_code == httpx.codes.OK
    with pytest.raises(TrainingError, match=r"samples\.0 cannot be used.*System role not supported"):
        trainer.train(recipe, [Sample([SYSTEM, turn], "yes")] * 2, AdaptConfig())
