"""Compare vLLM with the fused adapter to Hugging Face with the dense ΔW, on a real model, for both fusion methods.

Some cases have a user adapter stacked on top. A bank has one method, so `bench/oracle/banks.py` writes a second bank
with the same rows for the other. In float32 the log-probabilities must agree; in bfloat16, where rounding decides
near-ties, the benchmark reports the share of equal greedy texts.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.recipe import FusionMethod
from bank.items.prompt import chat_messages
from bank.models.folders import ensure_base_model
from bench import script
from bench.oracle.banks import Case, OpenBank, rewritten
from bench.oracle.dense import token_logprobs
from bench.page.report import report
from bench.rig.engine import Engine, running_engine
from bench.rig.user_adapters import keep_user_adapter
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings

PROMPTS, NEW_TOKENS = 40, 24
QUESTIONS = (
    "What should I cook tonight?",
    "Explain why the sky is blue.",
    "Generate a headline for the following article: The council voted to keep the old bridge.",
    "Write a short letter to a neighbour about a borrowed ladder.",
)


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank of method `shared`, without directions.")],
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    users: Annotated[Path | None, typer.Option(help="LaMP per-user file to take prompts from.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report the largest difference in log-probability (float32) and the share of equal greedy texts (bfloat16)."""
    shared = OpenBank.open(bank)
    if shared.manifest.directions or shared.manifest.method is not FusionMethod.SHARED:
        raise typer.BadParameter("its rows must be anchors' own, not directions, and share one A", param_hint="--bank")
    folder = ensure_base_model(model, Settings().cache_dir)
    texts = _prompts(users)
    with tempfile.TemporaryDirectory() as scratch:
        banks = [shared, rewritten(shared, Path(scratch))]
        gaps: dict[str, list[float]] = defaultdict(list)
        equal: dict[str, list[bool]] = defaultdict(list)
        with ValkeyProcess(Path(scratch) / "valkey") as valkey:
            cases = [case for opened in banks for case in opened.cases()]
            for case in cases:
                if case.user is not None:
                    keep_user_adapter(valkey.url, case.recipe, case.user, case.bank.manifest)
            exact, rounded = (_serve(banks, folder, dtype, valkey) for dtype in ("float32", "bfloat16"))
            for label, gap in _compare_float32(cases, exact, folder, texts):
                gaps[label].append(gap)
            for label, same in _compare_bfloat16(cases, rounded, folder, texts):
                equal[label].append(same)
    name = shared.manifest.base_model.name
    rows: list[tuple[str, object]] = [
        (f"{label}, float32: largest difference in log-probability", f"{max(found):.1e}")
        for label, found in gaps.items()
    ]
    rows += [
        (f"{label}, bfloat16: equal greedy texts of {NEW_TOKENS} tokens", f"{sum(same)} of {len(same)}")
        for label, same in equal.items()
    ]
    report(f"vLLM with the fused adapter against HF with dense ΔW: {name}, {PROMPTS} prompts", rows, out)


def _prompts(users: Path | None) -> list[str]:
    """Return users' own queries, or the questions above with a number."""
    if users is None:
        return [f"{QUESTIONS[i % len(QUESTIONS)]} ({i})" for i in range(PROMPTS)]
    people = json.loads(users.read_text(encoding="utf-8"))
    return [query["input"] for person in people for query in person["query"]][:PROMPTS]


def _serve(banks: Sequence[OpenBank], model: Path, dtype: str, valkey: ValkeyProcess) -> AbstractContextManager[Engine]:
    """Return an engine with both banks."""
    first, second = banks
    return running_engine(first.folder, model, dtype=dtype, redis_url=valkey.url, next_bank=second.folder)


def _compare_float32(
    cases: Sequence[Case], serving: AbstractContextManager[Engine], folder: Path, texts: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Yield the largest difference in token log-probability for each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with serving as engine:
        for case, text in _with_dense(model, cases, texts, "float32"):
            ids = _token_ids(tokenizer, text)
            served = torch.tensor(engine.prompt_logprobs(case.recipe.name, ids))
            yield case.label, (served - token_logprobs(model, ids)).abs().max().item()


def _compare_bfloat16(
    cases: Sequence[Case], serving: AbstractContextManager[Engine], folder: Path, texts: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """Yield whether greedy texts are equal; each side generates one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with serving as engine:
        for case, text in _with_dense(model, cases, texts, "bfloat16"):
            answer = engine.chat(case.recipe.name, text, max_tokens=NEW_TOKENS).raise_for_status()
            served = answer.json()["choices"][0]["message"]["content"]
            yield case.label, served == _greedy(model, tokenizer, text)


def _with_dense(model: Any, cases: Sequence[Case], texts: Sequence[str], dtype: str) -> Iterator[tuple[Case, str]]:
    """Yield every text twice for each bank: with one of its plain recipes and one of its stacked recipes."""
    for case in track(cases, f"{dtype}, a recipe at a time"):
        like = [other for other in cases if other.bank is case.bank and (other.user is None) == (case.user is None)]
        with case.dense(model):
            for text in texts[like.index(case) :: len(like)]:
                yield case, text


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Render a prompt as vLLM does."""
    rendered = tokenizer.apply_chat_template(chat_messages(text), add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def _greedy(model: Any, tokenizer: Any, text: str) -> str:
    """Return Hugging Face's greedy continuation."""
    ids = torch.tensor([_token_ids(tokenizer, text)])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


if __name__ == "__main__":
    script(main)
