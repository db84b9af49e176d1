"""Train and judge user adapters and make signatures, on one base model. No function here is asynchronous."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from adapters.errors import MtaError, TrainingError, shortened
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe, parse_recipe
from adapters.training.adapt_config import MAX_SAMPLE_TOKENS, SHOWN_TOKENS, AdaptConfig
from adapters.training.attached import half_without
from adapters.training.example import Example
from adapters.training.forward.shared_part import SharedPart, shared_part_of
from adapters.training.trainer import TrainPlan, initial_lora, train_lora
from adapters.training.user_trainer import IN_USE, MIN_JUDGES, Beneath, TrainingRun, train_user
from adapters.user_adapter import UserAdapter, decode_user_adapter, encode_user_adapter, samples_of, stack
from bank.building.signer import Signer
from bank.items.lessons import PastItems, add_memories, lesson_key
from bank.items.profile import Item, item_pair, normalised, own_texts
from bank.items.prompt import answer_ids, encode_conversation, encode_pair
from bank.items.tasks import Task, get_task
from bank.lookup.phrases import as_served, phrase_table
from bank.lookup.signature import MAX_ITEMS, Signature
from bank.manifest import BankManifest
from bank.matrix import open_matrix, shared_part
from bank.models.load import load_base
from server.store.adapters import StoredAdapter
from server.store.samples import Sample

log = logging.getLogger("mta.worker")

MAX_SIGNED_TOKENS = 512  # longest item in a signature; the inputs of longer items are cut at the end
CONFIG_REMEDY = "submit the job again"
SAMPLE_REMEDY = "send it as the model's chat template requires, or leave it out"
SHOWN_CHARS = 300  # of the input that they answer
_MAX_ERROR_CHARS = 300
_WARM_UP_TOKENS = 64  # length of the warm-up example


@contextmanager
def as_training_error(what: str, remedy: str) -> Iterator[None]:
    """Turn errors in the block into a TrainingError about a part of the job, such as `samples.3`.

    MemoryError passes through, since it is the process's fault. The block must not use a device.
    """
    try:
        yield
    except (MtaError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
        raise TrainingError(f"{what} cannot be used ({reason}): {remedy}") from error


@dataclass(frozen=True, slots=True)
class JobUser:
    """What a job knows of its user besides the samples."""

    recipe: Callable[[Signature | None, float], FusionRecipe]  # of a signature and a strength, as serving makes it
    signature: Signature | None = None
    items: Sequence[Item] = ()  # oldest first
    in_use: StoredAdapter | None = None  # the adapter that is served
    shows: bool = True  # whether the job's record may show a sample


def sample_hash(sample: Sample) -> str:
    return hashlib.sha256("\0".join(map(normalised, sample.pair)).encode()).hexdigest()[:8]


def pairs_of(items: Sequence[Item], task: Task) -> list[tuple[str, str]]:
    """Return the items' pairs that a signature is made from, oldest first."""
    pairs = (item_pair(item, task) for item in items)
    return [pair for pair in pairs if pair is not None][-MAX_ITEMS:]


class AdapterTrainer:
    """Trains user adapters of one bank on one base model."""

    def __init__(
        self,
        manifest: BankManifest,
        matrix: MetaMatrix,
        model: Any,
        tokenizer: Any,
        sample_tokens: int = MAX_SAMPLE_TOKENS,
    ) -> None:
        self.manifest = manifest
        self.task = get_task(manifest.task)
        self.matrix = matrix
        self.model = model
        self.tokenizer = tokenizer
        self._context = min(int(model.config.get_text_config().max_position_embeddings), sample_tokens)
        self._vocab_size = int(model.get_input_embeddings().num_embeddings)

    @classmethod
    def open(
        cls,
        bank: Path,
        manifest: BankManifest,
        model_folder: Path,
        dtype: str,
        sample_tokens: int = MAX_SAMPLE_TOKENS,
    ) -> AdapterTrainer:
        """Map the bank and load the base model. Raises BankError when either is damaged."""
        return cls(manifest, open_matrix(bank, manifest), *load_base(model_folder, dtype), sample_tokens)

    def warm_up(self) -> None:
        """Train a throw-away LoRA for one step, because the first step of a process is slow."""
        start = initial_lora(self.manifest.layout.modules, 1, seed=0)
        train_lora(self.model, [Example((0,) * _WARM_UP_TOKENS, 1)], TrainPlan(1, 1, 1e-3, 0), start=start)

    def train(
        self, user: JobUser, samples: Sequence[Sample], config: AdaptConfig, learned: Sequence[Sample] = ()
    ) -> TrainingRun:
        """Train and judge a user adapter on top of a user's recipe, step by step.

        The newest of the `learned` samples (oldest first) are added as far as the job's token budget allows. If the
        bank was trained with history, prepend some of the user's items to samples, within the rest. Samples that the
        adapter in use was trained on judge only if there are too few others.
        """
        room = self.manifest.serving_rank - self.manifest.rank_of(user.recipe(user.signature, config.strength))
        if config.rank > room:
            raise TrainingError(f"rank {config.rank} does not fit: the bank leaves rank {room} for users")
        examples = [
            self._example(f"samples.{position}", encode_conversation, list(sample.messages), sample.output)
            for position, sample in enumerate(samples)
        ]
        kept = self._learned(learned, examples, config)
        samples = [*samples, *(sample for sample, _ in kept)]
        examples += [example for _, example in kept]
        if not examples:
            raise TrainingError("no sample can be used: too long, or refused by the model's chat template")
        past = PastItems(self.task, user.items, self.manifest.history_share, config.seed)
        left = config.room_for_past([len(example.ids) for example in examples])
        for position, sample in enumerate(samples):
            if left and (memories := past.memories(*sample.pair)):
                what, alone = f"samples.{position}", len(examples[position].ids)
                messages, max_tokens = list(sample.messages), min(alone + left, self._context)
                with as_training_error(what, SAMPLE_REMEDY):
                    messages = add_memories(
                        self.tokenizer, past.task, messages, sample.output, memories=memories, max_tokens=max_tokens
                    )
                examples[position] = self._example(what, encode_conversation, messages, sample.output)
                left -= len(examples[position].ids) - alone
        in_use, known = None, frozenset[str]()
        if user.in_use:
            in_use, known = decode_user_adapter(self.manifest.layout, user.in_use.raw), samples_of(user.in_use.raw)
        new = [position for position, sample in enumerate(samples) if sample_hash(sample) not in known]
        pairs = [item_pair(item, self.task) for item in user.items]
        keys = [pair and lesson_key(self.task, *pair) for pair in pairs]

        @lru_cache(1)
        def made_of(unseen: tuple[int, ...]) -> Beneath:
            signature, items = user.signature, [user.items[position] for position in unseen]
            if signature and len(unseen) < len(pairs):
                signature = self.signature(pairs_of(items, self.task))
            beneath = self._beneath(partial(user.recipe, signature), config.strength, in_use)
            return replace(beneath, served=as_served(self.manifest, self.tokenizer, own_texts(items, self.task)))

        def beneath(held: Sequence[int]) -> Beneath:
            seen = {lesson_key(self.task, *samples[position].pair) for position in held}
            return made_of(tuple(position for position, key in enumerate(keys) if key not in seen))

        def write(position: int) -> tuple[str, ...]:
            turn, output = samples[position].pair
            try:
                return shortened(turn, SHOWN_CHARS), shortened(output, SHOWN_CHARS), *self._answers(examples[position])
            except Exception as error:  # it shows what was learnt, and decides nothing
                log.warning("no answer to show: %s", type(error).__name__)
                return ()

        judges = new if len(new) >= MIN_JUDGES else None
        return train_user(self.model, beneath, examples, config, judges=judges, write=write if user.shows else None)

    @torch.no_grad()
    def _answers(self, example: Example) -> tuple[str, ...]:
        """Return how the likeliest answer to a prompt begins without the adapter in training, and with it."""
        part = shared_part_of(self.model)
        prefix = part.prefix(example) if part else ()
        known = part.cache(self.model, [prefix]) if part and prefix else None
        if known:
            known.batch_repeat_interleave(2)
        ids = torch.tensor([example.ids[: example.loss_from]] * 2).to(self.model.device)
        with half_without(self.model):
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=known,
                max_new_tokens=SHOWN_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return tuple(
            text.strip() for text in self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        )

    def _beneath(self, recipe: Callable[[float], FusionRecipe], strength: float, in_use: UserAdapter | None) -> Beneath:
        def fused(recipe: FusionRecipe) -> LoraWeights:
            return fuse(self.matrix, recipe, torch.float32)

        ground = fused(recipe(strength))
        rivals: dict[str, Callable[[], LoraWeights | None]] = {
            "the merged adapter": lambda: ground if strength == 1 else fused(recipe(1.0))
        }
        if in_use:
            served = fused(parse_recipe(in_use.recipe))
            rivals[IN_USE] = lambda: stack(served, in_use, torch.float32)
            rivals[f"{IN_USE}, on the new recipe"] = lambda: stack(ground, in_use, torch.float32)
        if self.manifest.common:
            rivals["the common row"] = lambda: fused(self.manifest.common_recipe)
        return Beneath(ground, rivals | {"the base model": lambda: None}, shared=self.shared)

    def _learned(
        self, learned: Sequence[Sample], given: Sequence[Example], config: AdaptConfig
    ) -> list[tuple[Sample, Example]]:
        """Return the newest learned samples that fit, oldest first. One that cannot be used or is known is left out."""
        kept: list[tuple[Sample, Example]] = []
        known, lengths = set(given), [len(example.ids) for example in given]
        for sample in reversed(learned):
            try:
                example = self._example("a learned sample", encode_conversation, list(sample.messages), sample.output)
            except TrainingError:
                continue
            if example in known:  # held out, it would be trained on as well
                continue
            known.add(example)
            lengths = [*lengths, len(example.ids)]
            if config.tokens_read(lengths) > config.max_tokens:
                break
            kept.append((sample, example))
        return kept[::-1]

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature:
        """Return the signature of a user's items; an empty one if the items have nothing to learn from."""
        max_tokens = min(MAX_SIGNED_TOKENS, self._context)
        examples = [
            self._example(f"items.{position}", encode_pair, *pair, max_tokens) for position, pair in enumerate(pairs)
        ]
        return self._signer.signature(self.manifest.short, examples)

    def phrases(self, items: Sequence[Item]) -> bytes:
        """Return the user's phrase table, of their newest texts; empty if the bank has no trust in tables."""
        if not self.manifest.phrases:
            return b""
        with as_training_error("the items", SAMPLE_REMEDY):
            return phrase_table(answer_ids(self.tokenizer, own_texts(items, self.task))).tobytes()

    @cached_property
    def shared(self) -> SharedPart | None:
        return shared_part(self.matrix, self.manifest)

    @cached_property
    def _signer(self) -> Signer:
        return Signer(self.model, self.matrix, self.manifest.acts)

    def encoded(self, recipe: FusionRecipe, weights: LoraWeights, samples: Sequence[Sample]) -> bytes:
        """Return a user adapter as it is stored, with the hashes of its samples."""
        hashes = frozenset(map(sample_hash, samples))
        return encode_user_adapter(self.manifest.layout, UserAdapter(recipe.name, weights), hashes)

    def _example(self, what: str, encode: Callable[..., Example], *content: Any) -> Example:
        """Encode; refuse content on which the model would fail with an error that looks like a fault of the process."""
        with as_training_error(what, SAMPLE_REMEDY):
            example = encode(self.tokenizer, *content)
        if len(example.ids) > self._context:
            raise TrainingError(
                f"{what} has {len(example.ids)} tokens, but a sample may have at most {self._context}: shorten it"
            )
        if not 0 < example.loss_from < len(example.ids):
            raise TrainingError(f"{what} has no token to learn after a prompt: {SAMPLE_REMEDY}")
        if max(example.ids) >= self._vocab_size:
            raise TrainingError(
                f"{what} has token id {max(example.ids)}, but the model knows only {self._vocab_size}: {SAMPLE_REMEDY}"
            )
        return example
