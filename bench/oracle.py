"""vLLM with the fused adapter against Hugging Face with the dense ΔW, on a real model, for every method.

A bank has one method, so the other two get a bank of the same trained rows, written out anew: with method `shared`
each row's A is the frozen one. In float32 the log-probabilities must agree; in bfloat16, where rounding decides
near-ties, the share of equal greedy texts is reported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.flat import flat_a, flat_b, lora_of
from adapters.layout import RowLayout, serving_rank
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix, write_matrix
from adapters.recipe import FusionRecipe, Method, Term
from bank.manifest import MATRIX_FILE, BankManifest, file_sha256, fused_rank, read_manifest, write_manifest
from bank.models import ensure_base_model
from bank.prompt import chat_messages
from bench.dense import dense_adapter, token_logprobs
from bench.report import report
from server.settings import Settings
from tests.support.engine import running_engine

QUESTIONS = (
    "What should I cook tonight?",
    "Explain why the sky is blue.",
    "Generate a headline for the following article: The council voted to keep the old bridge.",
    "Write a short letter to a neighbour about a borrowed ladder.",
)


@dataclass(frozen=True, slots=True)
class OpenBank:
    """A bank on disk with its rows."""

    folder: Path
    manifest: BankManifest
    matrix: MetaMatrix

    @classmethod
    def open(cls, folder: Path) -> OpenBank:
        """Read a bank."""
        manifest = read_manifest(folder)
        anchors = len(manifest.anchors)
        matrix = MetaMatrix.open(folder / MATRIX_FILE, manifest.layout, anchors, manifest.common)
        return cls(folder, manifest, matrix)

    def recipes(self) -> list[FusionRecipe]:
        """Two anchors with and without the common row, one anchor, and the common row alone."""
        common, last = self.manifest.common, len(self.manifest.anchors) - 1
        made = [
            (common, (Term(0, 571), Term(last, 429))),
            (False, (Term(1, 300), Term(last - 1, 700))),
            (common, (Term(2, 1000),)),
        ]
        made += [(True, ())] if common else []
        return [FusionRecipe(self.manifest.short, self.manifest.method, c, terms) for c, terms in made]


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank of method `shared`.")],
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    users: Annotated[Path | None, typer.Option(help="LaMP per-user file to take prompts from.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts.", min=4)] = 40,
    new_tokens: Annotated[int, typer.Option(help="Length of the greedy texts.")] = 24,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Largest difference in log-probability (float32) and share of equal greedy texts (bfloat16)."""
    folder = ensure_base_model(model, Settings().cache_dir)
    texts = _prompts(users, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        shared = OpenBank.open(bank)
        banks = [shared, *(_rewritten(shared, method, Path(scratch)) for method in (Method.CAT, Method.LINEAR))]
        largest = {b.manifest.method: 0.0 for b in banks}
        equal: dict[Method, list[bool]] = {b.manifest.method: [] for b in banks}
        for pair in (banks[:1], banks[1:]):
            _compare_float32(pair, folder, texts, largest)
            _compare_bfloat16(pair, folder, texts, new_tokens, equal)
    name = shared.manifest.base_model.name
    rows: list[tuple[str, object]] = [
        (f"{method.value}, float32: largest difference in log-probability", f"{value:.1e}")
        for method, value in largest.items()
    ]
    rows += [
        (f"{method.value}, bfloat16: equal greedy texts of {new_tokens} tokens", f"{sum(same)} of {len(same)}")
        for method, same in equal.items()
    ]
    report(f"vLLM with the fused adapter against HF with dense ΔW: {name}, {prompts} prompts", rows, out)


def _prompts(users: Path | None, count: int) -> list[str]:
    """Users' own queries, or the questions above with a number."""
    if users is None:
        return [f"{QUESTIONS[i % len(QUESTIONS)]} ({i})" for i in range(count)]
    people = json.loads(users.read_text(encoding="utf-8"))
    return [query["input"] for person in people for query in person["query"]][:count]


def _rewritten(shared: OpenBank, method: Method, scratch: Path) -> OpenBank:
    """The same rows as a bank of another method, every row with an A of its own.

    Row i is turned inside its rank by an orthogonal Q: (B Qᵀ)(Q A) is the same ΔW, and what `linear` does across rows,
    Bᵢ Aⱼ, is not.
    """
    old, folder = shared.manifest, scratch / method.value
    folder.mkdir()
    layout = RowLayout(old.layout.modules, old.rank, shared_a=False)
    assert shared.matrix.shared_a is not None
    rows = [
        _turned(layout, lora_of(layout, shared.matrix.shared_a.float(), row.float()), seed)
        for seed, row in enumerate(shared.matrix.rows)
    ]
    write_matrix(folder / MATRIX_FILE, layout, rows)
    rank = serving_rank(fused_rank(method, old.rank, old.weights.anchors, old.common) + old.user_rank)
    manifest = old.model_copy(
        update={
            "method": method,
            "serving_rank": rank,
            "files": {MATRIX_FILE: file_sha256(folder / MATRIX_FILE)},
        }
    )
    write_manifest(folder, manifest)
    return OpenBank.open(folder)


def _turned(layout: RowLayout, lora: LoraWeights, seed: int) -> torch.Tensor:
    """A LoRA turned inside its rank, as a row."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(lora.rank, lora.rank, generator=generator))
    turned = LoraWeights(
        lora.rank,
        a={name: q @ a for name, a in lora.a.items()},
        b={name: b @ q.T for name, b in lora.b.items()},
    )
    return torch.cat([flat_a(layout, turned), flat_b(layout, turned)])


def _serve(banks: Sequence[OpenBank], model: Path, dtype: str) -> Any:
    """An engine with one or two banks."""
    beside = {"next_bank": banks[1].folder} if len(banks) > 1 else {}
    return running_engine(banks[0].folder, model, dtype=dtype, **beside)


def _compare_float32(
    banks: Sequence[OpenBank], folder: Path, texts: Sequence[str], largest: dict[Method, float]
) -> None:
    """Log-probabilities of whole prompts, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with _serve(banks, folder, "float32") as engine:
        for method, recipe, text in _with_dense(model, banks, texts, "float32"):
            ids = _token_ids(tokenizer, text)
            served = torch.tensor(engine.prompt_logprobs(recipe, ids))
            gap = (served - token_logprobs(model, ids)).abs().max().item()
            largest[method] = max(largest[method], gap)


def _compare_bfloat16(
    banks: Sequence[OpenBank], folder: Path, texts: Sequence[str], new_tokens: int, equal: dict[Method, list[bool]]
) -> None:
    """Greedy texts, one at a time on both sides."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with _serve(banks, folder, "bfloat16") as engine:
        for method, recipe, text in _with_dense(model, banks, texts, "bfloat16"):
            answer = engine.chat(recipe, text, max_tokens=new_tokens).raise_for_status()
            served = answer.json()["choices"][0]["message"]["content"]
            equal[method].append(served == _greedy(model, tokenizer, text, new_tokens))


def _with_dense(
    model: Any, banks: Sequence[OpenBank], texts: Sequence[str], dtype: str
) -> Iterator[tuple[Method, str, str]]:
    """Every text once under one recipe of each bank, while the model carries that recipe's dense ΔW."""
    for bank in banks:
        method, recipes = bank.manifest.method, bank.recipes()
        for at, recipe in enumerate(track(recipes, f"{method.value}, {dtype}, a recipe at a time")):
            with dense_adapter(model, bank.matrix, recipe):
                for text in texts[at :: len(recipes)]:
                    yield method, recipe.name, text


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt as vLLM renders it."""
    rendered = tokenizer.apply_chat_template(chat_messages(text), add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def _greedy(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    """Hugging Face's greedy continuation."""
    ids = torch.tensor([_token_ids(tokenizer, text)])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    answer: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


if __name__ == "__main__":
    typer.run(main)
