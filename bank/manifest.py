"""`bank.json`: what a bank is, what it was made for, and the checksums that prove it is intact.

It is written last, by rename: a folder without one is not a bank. Its fingerprint is the SHA-256 of its own canonical
JSON, checksums included: equal fingerprints, equal banks. It holds no user ids, texts or times.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import FusionError, excerpt
from adapters.lora import ModuleShape, RowLayout
from adapters.recipe import FusionMethod, FusionRecipe, anchor_id
from bank.errors import BankError

MANIFEST_FILE = "bank.json"
MATRIX_FILE = "meta_loras.safetensors"
INDEX_FILE = "anchors.faiss"
CURVATURE_FILE = "curvature.npy"
MAP_FILE = "map.json"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelId(Frozen):
    """The base model: its name for people, its hash for the check."""

    name: str
    hash: str


class EmbedderId(Frozen):
    """The embedder whose vectors the index holds. `id` is the hash of its ONNX file, `dim` is E."""

    id: str
    dim: int = Field(gt=0)


class PosteriorRule(Frozen):
    """How a signature becomes steps from the common row (`bank/lookup/signature.py`)."""

    anchors: int = Field(default=1024, ge=1)  # K, along how many rows a user may step; the longest steps count
    decay: float = Field(default=250.0, gt=0)  # λ in units of tr H / N: about how many output tokens it takes to trust


class WeightRule(Frozen):
    """How a profile becomes weights (`bank/lookup/serving.py`)."""

    anchors: int = Field(default=2, ge=1)  # K, how many anchors take part by topics
    strength: float = Field(default=1.0, gt=0, le=1)  # what their weights sum to; below 1 only beside a common row
    posterior: PosteriorRule | None = None  # takes over once a user has a signature; None without a common row


class AnswerPrior(Frozen):
    """What people answer before anything is read (`bank/lookup/prior.py`)."""

    weight: float = Field(gt=0)  # how many of a person's own answers everybody's shares count for
    shares: dict[str, float]  # everybody's, by answer; they sum to 1


class LossDifference(Frozen):
    """A difference in loss over people, nats a token, with its 95 % interval; negative is better.

    `mean` is that of a typical person: the median of the means of any two.
    """

    mean: float
    low: float
    high: float

    @property
    def is_lower(self) -> bool:
        """Whether it is below 0, surely."""
        return self.high < 0

    @property
    def is_higher(self) -> bool:
        """Whether it is above 0, surely."""
        return self.low > 0


class Verdict(Frozen):
    """What a bank does to the loss of later answers of people left out of it (`bank/evaluation/verdict.py`)."""

    people: int = Field(ge=1)  # how many there were
    losses: dict[str, float]  # mean by method, nats a token
    merged: LossDifference  # the bank's own rule less the common row alone
    recalled: LossDifference  # the common row with `history` past items in the prompt (1 where that is 0), less without
    both: LossDifference  # the bank's own rule with them, less without
    beyond: LossDifference  # the bank's own rule with them, less the common row with them
    prior: LossDifference | None = None  # the bank's own rule less the histogram of answers; None for free answers
    history: int = Field(default=0, ge=0)  # how many past items prompts get by default


class ModuleEntry(Frozen):
    """One adapted linear module, as in `adapters.lora.ModuleShape`."""

    name: str
    h_in: int = Field(gt=0)
    h_out: int = Field(gt=0)


class AnchorEntry(Frozen):
    """One anchor: its public id, how many items it was trained on and, if the build was to keep them, typical words."""

    id: str
    items: int = Field(ge=0)
    words: tuple[str, ...] = ()


class BankManifest(Frozen):
    format: Literal[4] = 4
    task: str
    base_model: BaseModelId
    embedder: EmbedderId
    method: FusionMethod
    common: bool
    rank: int = Field(gt=0)
    user_rank: int = Field(ge=0)
    serving_rank: int = Field(gt=0)
    weights: WeightRule
    prior: AnswerPrior | None = None
    verdict: Verdict | None = None
    target_modules: tuple[str, ...]
    modules: tuple[ModuleEntry, ...]
    anchors: tuple[AnchorEntry, ...]
    training: dict[str, int | float | str | bool | None]
    files: dict[str, str]
    fingerprint: str = ""

    @property
    def short(self) -> str:
        """The 8 hex digits that recipes carry."""
        return self.fingerprint[:8]

    @property
    def layout(self) -> RowLayout:
        modules = tuple(ModuleShape(m.name, m.h_in, m.h_out) for m in self.modules)
        return RowLayout(modules, self.rank, self.method is FusionMethod.SHARED)

    @property
    def fused_rank(self) -> int:
        """The rank of the largest fusion this bank's rule makes, without user adapters."""
        return fused_rank(self.method, self.rank, self.weights.anchors, self.common)

    @property
    def has_signatures(self) -> bool:
        """Whether signatures speak for its users."""
        return self.weights.posterior is not None

    @property
    def history_share(self) -> float:
        """Share of the training items that had past items of the same person in the prompt."""
        return float(self.training.get("history_share") or 0)

    @property
    def history_default(self) -> int:
        return self.verdict.history if self.verdict else 0

    @property
    def room(self) -> int:
        """The rank that the largest fusion leaves for a user's LoRA."""
        return self.serving_rank - self.fused_rank

    def check(self, recipe: FusionRecipe) -> None:
        """Make sure that a recipe can be fused, its user adapter apart; FusionError names what the bank lacks."""
        if recipe.bank != self.short:
            raise FusionError(f"the recipe belongs to the bank {recipe.bank}, but this one is {self.short}")
        if recipe.method is not self.method:
            raise FusionError(
                f"bank {recipe.bank} fuses by `{self.method.value}`, but the recipe asks for `{recipe.method.value}`"
            )
        if recipe.common and not self.common:
            raise FusionError(f"bank {recipe.bank} has no common row, but the recipe {recipe.name} asks for one")
        most = len(self.anchors) if self.method is FusionMethod.SHARED else self.weights.anchors
        if len(recipe.terms) > most:  # of a `shared` bank they add no rank
            raise FusionError(
                f"bank {recipe.bank} fuses at most {most} anchors, but the recipe has {len(recipe.terms)}"
            )
        if recipe.terms and (asked := recipe.terms[-1].anchor) >= len(self.anchors):
            last = anchor_id(len(self.anchors) - 1)
            raise FusionError(
                f"bank {recipe.bank} has anchors a00 to {last}, but the recipe asks for {anchor_id(asked)}"
            )

    def rank_of(self, recipe: FusionRecipe) -> int:
        return fused_rank(self.method, self.rank, len(recipe.terms), recipe.common)

    def compute_fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of everything but the fingerprint itself."""
        content = self.model_dump(mode="json", exclude={"fingerprint"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fused_rank(method: FusionMethod, rank: int, anchors: int, common: bool) -> int:
    """The rank of a fusion of `anchors` meta-LoRAs of rank `rank`, with or without the common row."""
    if method is FusionMethod.SHARED:
        return rank
    return (anchors + common) * rank


def read_manifest(folder: Path) -> BankManifest:
    """Read and check `bank.json` alone; `verify_files` checks the rest."""
    path = folder / MANIFEST_FILE
    try:
        manifest = BankManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BankError(
            f"no bank at {folder}: {MANIFEST_FILE} is missing. Build one with `mta bank build --out {folder}`"
        ) from None
    except OSError as error:
        raise BankError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",):
            raise BankError(
                f"the bank at {folder} is of format {excerpt(first['input'])}, which is not read: build it again with "
                "`mta bank build`, or import it again with `mta bank import`"
            ) from None
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BankError(f"{path} is not a bank manifest: {where}: {first['msg']}") from error
    if manifest.compute_fingerprint() != manifest.fingerprint:
        raise BankError(
            f"{path} does not match its fingerprint {manifest.fingerprint[:8]}…: it was changed after it was "
            "built. Restore the folder or build the bank again"
        )
    return manifest


def write_manifest(folder: Path, manifest: BankManifest) -> BankManifest:
    """Stamp the fingerprint, which the answer has too, and put the manifest in place by rename, after all it names."""
    stamped = manifest.model_copy(update={"fingerprint": manifest.compute_fingerprint()})
    path = folder / MANIFEST_FILE
    draft = path.with_suffix(".json.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(stamped.model_dump(mode="json"), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return stamped


def verify_files(folder: Path, manifest: BankManifest, names: tuple[str, ...] | None = None) -> None:
    """Check files of the bank, all of them when None; BankError names the first that is missing or damaged."""
    for name in names if names is not None else tuple(manifest.files):
        path = folder / name
        try:
            found = file_sha256(path)
        except FileNotFoundError:
            raise BankError(f"the bank at {folder} lacks {name}: copy it again or build the bank again") from None
        if found != manifest.files.get(name):
            raise BankError(
                f"{path} is damaged: its SHA-256 is {found[:12]}…, but the manifest says "
                f"{str(manifest.files.get(name))[:12]}…. Copy the bank again or build it again"
            )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
