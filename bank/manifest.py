"""`bank.json`: the manifest of a bank, with the models it was built for and the checksums of its files.

The manifest is written last, by rename: a folder without one is not a bank. The fingerprint is the SHA-256 of the
manifest's canonical JSON, so equal fingerprints mean equal banks. It holds no user ids, texts or times.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from statistics import median
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import FusionError, excerpt
from adapters.lora import ModuleShape, RowLayout
from adapters.recipe import MAX_DIRECTIONS, FusionMethod, FusionRecipe, anchor_id
from adapters.training.example import Acts
from bank.errors import BankError

MANIFEST_FILE = "bank.json"
MATRIX_FILE = "meta_loras.safetensors"
INDEX_FILE = "anchors.faiss"
CURVATURE_FILE = "curvature.npy"
MAP_FILE = "map.json"
COORDINATES_FILE = "coordinates.npy"
ROWS_FILE = "rows.safetensors"  # the anchors' rows that directions were made of; only `mta bank` reads it
LONGEST_SUFFIX = 4  # K, tokens before the token of a phrase (`bank/lookup/phrases.py`)
BASE = "base"  # what recipes' names are to adapters, of the base model
_LEVEL = 0.95
_NO_BOUND = 1e9  # JSON has no infinity


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelId(Frozen):
    """The base model: a display name, the hub's revision, and the hashes that are checked. Older banks lack two."""

    name: str
    hash: str
    revision: str | None = Field(default=None, exclude_if=lambda value: not value)
    prompts: dict[str, str] = Field(default={}, exclude_if=lambda value: not value)  # `prompt_hashes`

    def unlike(self, prompts: Mapping[str, str]) -> str:
        """Name those of `prompts` that this model has otherwise; empty if nothing is known of either."""
        return " and ".join(part for part, hashed in prompts.items() if self.prompts.get(part, hashed) != hashed)


class EmbedderId(Frozen):
    """The embedder that made the vectors in the index. `id` is the hash of its ONNX file; `dim` is E."""

    id: str
    dim: int = Field(gt=0)


class PosteriorRule(Frozen):
    """Constants that turn a signature into steps from the common row (`bank/lookup/signature.py`)."""

    decay: float = Field(default=250.0, gt=0)  # λ in units of tr H / N: output tokens for evidence to equal the prior


class WeightRule(Frozen):
    """Constants that turn a profile into weights (`bank/lookup/serving.py`)."""

    anchors: int = Field(default=2, ge=1)  # K, number of anchors with a topic weight
    strength: float = Field(default=1.0, gt=0, le=1)  # sum of the topic weights; below 1 only with a common row
    posterior: PosteriorRule | None = None  # rule for users with a signature; None without a common row


class AnswerPrior(Frozen):
    """The distribution of answers, independent of the question (`bank/lookup/prior.py`)."""

    weight: float = Field(gt=0)  # weight of everybody's shares, as a number of a person's own answers
    shares: dict[str, float]  # everybody's share of each answer; sums to 1


class LossDifference(Frozen):
    """A Hodges-Lehmann estimate over people, in nats per token, with its 95 % interval; negative is better."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Estimate from one value per person, with the exact signed-rank interval; fewer than six have no bounds.

        With few people, one outlier makes Student's interval wide, and the bootstrap's interval is too narrow.
        """
        n = len(values)
        pairs = sorted((one + other) / 2 for one, other in combinations_with_replacement(values, 2))
        sums = np.ones(1)  # counts of the 2ⁿ sign choices of ranks 1 to n by the sum of the positive ranks: 0, 1, …
        for rank in range(1, n + 1):
            sums = np.pad(sums, (0, rank)) + np.pad(sums, (rank, 0))
        outside = int(np.sum(np.cumsum(sums) / 2**n <= (1 - _LEVEL) / 2))
        low, high = (pairs[outside - 1], pairs[-outside]) if outside else (-_NO_BOUND, _NO_BOUND)
        return cls(mean=median(pairs), low=low, high=high)

    @property
    def is_lower(self) -> bool:
        return self.high < 0

    @property
    def is_higher(self) -> bool:
        return self.low > 0


class PhraseRule(Frozen):
    """How far to trust a person's phrase table (`bank/lookup/phrases.py`), and what that was worth at the build."""

    trust: tuple[float, ...] = Field(min_length=LONGEST_SUFFIX, max_length=LONGEST_SUFFIX)  # λ by length of the suffix
    people: int = Field(ge=1)  # number of people on whom it was chosen
    gain: LossDifference  # on their later answers: with a table, trusted as the others say, minus without


class Verdict(Frozen):
    """A bank's effect on the loss of later answers of people held out of it (`evaluation/verdict.py`)."""

    people: int = Field(ge=1)  # number of held-out people
    losses: dict[str, float]  # mean loss by method, in nats per token
    merged: LossDifference  # the bank's rule minus the common row alone
    recalled: LossDifference  # the common row with past items minus without
    both: LossDifference  # the bank's rule with past items minus without
    beyond: LossDifference  # the bank's rule minus the common row, both with past items
    prior: LossDifference | None = None  # the bank's rule minus the histogram of answers; None for free-text answers
    words: LossDifference | None = Field(default=None, exclude_if=lambda value: value is None)  # rule: table minus none
    history: int = Field(default=0, ge=0)  # default number of past items in prompts; if 0, those above have 1


class Canary(Frozen):
    """How training reads a few tokens, by which an engine knows that its adapters act alike.

    `read` has the log-probabilities of the tokens from `read_from` on: of the base model under `BASE`, then by what a
    recipe's name has as terms; each adds to the one before.
    """

    ids: tuple[int, ...]
    read_from: int = Field(ge=1)
    shared: int = Field(ge=0)  # number of the first tokens that all users of the bank share
    read: dict[str, tuple[float, ...]]


class AnchorEntry(Frozen):
    """One anchor: its public id, its number of training items and, if the build kept them, its typical words."""

    id: str
    items: int = Field(ge=0)
    words: tuple[str, ...] = ()


class BankManifest(Frozen):
    format: Literal[5] = 5
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
    phrases: PhraseRule | None = Field(default=None, exclude_if=lambda value: value is None)
    verdict: Verdict | None = None
    canary: Canary | None = Field(default=None, exclude_if=lambda value: value is None)
    target_modules: tuple[str, ...]
    modules: tuple[ModuleShape, ...]
    anchors: tuple[AnchorEntry, ...]
    directions: int | None = Field(default=None, ge=1, le=MAX_DIRECTIONS)  # K; None if each row is an anchor's own
    training: dict[str, int | float | str | bool | None]
    files: dict[str, str]
    fingerprint: str = ""

    @property
    def short(self) -> str:
        """First 8 hex digits of the fingerprint, which recipes carry."""
        return self.fingerprint[:8]

    @property
    def layout(self) -> RowLayout:
        return RowLayout(self.modules, self.rank, self.method is FusionMethod.SHARED)

    @property
    def personal_rows(self) -> int:
        """Number of the matrix's rows apart from the common row."""
        return self.directions or len(self.anchors)

    @property
    def anchor_rows_file(self) -> str:
        """File of the matrix whose rows are the anchors' own; engines never read that of a bank of directions."""
        return ROWS_FILE if self.directions else MATRIX_FILE

    @property
    def fused_rank(self) -> int:
        """Rank of the largest fusion under this bank's rule, without user adapters."""
        return fused_rank(self.method, self.rank, self.weights.anchors, self.common)

    @property
    def has_signatures(self) -> bool:
        return self.weights.posterior is not None

    @property
    def history_share(self) -> float:
        """Share of the training items with past items of the same person in the prompt."""
        return float(self.training.get("history_share") or 0)

    @property
    def acts(self) -> Acts:
        return Acts(str(self.training.get("acts", Acts.EVERYWHERE)))

    @property
    def common_recipe(self) -> FusionRecipe:
        return FusionRecipe(self.short, self.method, True, ())

    @property
    def shares_prompts(self) -> bool:
        """Whether all users share what the model reads before the personal part acts."""
        return self.acts is not Acts.EVERYWHERE

    @property
    def history_default(self) -> int:
        return self.verdict.history if self.verdict else 0

    @property
    def words_default(self) -> bool:
        """Whether requests use the user's phrase table by default: where it was surely worth something."""
        judged = self.phrases.gain if self.phrases else None
        if self.verdict and self.verdict.words:
            judged = self.verdict.words
        return judged is not None and judged.is_lower

    @property
    def room(self) -> int:
        """Rank left for a user's LoRA beside the largest fusion."""
        return self.serving_rank - self.fused_rank

    def check(self, recipe: FusionRecipe) -> None:
        """Raise FusionError unless this bank can fuse the recipe; its user adapter is not checked."""
        if recipe.bank != self.short:
            raise FusionError(f"the recipe belongs to the bank {recipe.bank}, but this one is {self.short}")
        if recipe.method is not self.method:
            raise FusionError(
                f"bank {recipe.bank} fuses by `{self.method.value}`, but the recipe asks for `{recipe.method.value}`"
            )
        if recipe.common and not self.common:
            raise FusionError(f"bank {recipe.bank} has no common row, but the recipe {recipe.name} asks for one")
        if (recipe.terms and self.directions) or (recipe.steps and len(recipe.steps) != self.directions):
            has = f"{self.directions} directions" if self.directions else "anchors and no directions"
            raise FusionError(f"bank {recipe.bank} has {has}, but the recipe is {recipe.name}")
        most = len(self.anchors) if self.method is FusionMethod.SHARED else self.weights.anchors
        if len(recipe.terms) > most:  # a `shared` bank allows all anchors, because they add no rank
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
        """Return the SHA-256 (64 hex digits) of all fields except the fingerprint."""
        content = self.model_dump(mode="json", exclude={"fingerprint"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fused_rank(method: FusionMethod, rank: int, anchors: int, common: bool) -> int:
    """Return the rank of a fusion of `anchors` meta-LoRAs of rank `rank`, with or without the common row."""
    if method is FusionMethod.SHARED:
        return rank
    return (anchors + common) * rank


def read_manifest(folder: Path) -> BankManifest:
    """Read and check `bank.json`; `verify_files` checks the other files."""
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
                f"the bank at {folder} has format {excerpt(first['input'])}, which is not supported: build it again "
                "with `mta bank build`, or import it again with `mta bank import`"
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
    """Set the fingerprint, write the manifest by rename, and return it; all files that it lists must exist already."""
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
    """Check the named files, or all but missing anchors' rows if None; BankError names the first missing or damaged."""
    for name in names if names is not None else tuple(manifest.files):
        path = folder / name
        if names is None and name == ROWS_FILE and not path.exists():
            continue
        try:
            actual = file_sha256(path)
        except FileNotFoundError:
            raise BankError(f"the bank at {folder} lacks {name}: copy it again or build the bank again") from None
        except OSError as error:
            raise BankError(f"cannot read {path}: {error.strerror}") from error
        if actual != manifest.files.get(name):
            raise BankError(
                f"{path} is damaged: its SHA-256 is {actual[:12]}…, but the manifest says "
                f"{str(manifest.files.get(name))[:12]}…. Copy the bank again or build it again"
            )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
