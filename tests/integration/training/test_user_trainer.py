"""Training user adapters on a tiny model: that they help, that they are judged, and that nothing else moves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, RowLayout
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.loss import mean_loss
from adapters.training.trainer import TrainPlan, linear_modules, train_lora
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun, train_user
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack

CONFIG = AdaptConfig(rank=2, steps=8, learning_rate=2e-2, holdout=0.2, seed=0)


@pytest.fixture(scope="module")
def samples(encode: Any) -> list[Example]:
    """Ten samples of one manner."""
    return [encode(f"question {n}", f"{n} yes yes yes") for n in range(10)]


@pytest.fixture(scope="module")
def fluent(model: Any, fused: LoraWeights, samples: list[Example]) -> LoraWeights:
    """A fused adapter that speaks their manner already."""
    return train_lora(model, samples, TrainPlan(steps=60, batch_size=10, learning_rate=2e-2, seed=0), start=fused)


def steps(training: TrainingRun) -> Iterator[TrainingProgress]:
    """Where training is after every step; signs of life in between are left out."""
    step = 0
    for progress in training:
        if progress.step > step:
            step = progress.step
            yield progress


def served_loss(model: Any, fused: LoraWeights, judgement: Judgement, samples: Sequence[Example]) -> float:
    """The samples' loss under the stacked adapter, as it would be served in float32."""
    assert judgement.weights is not None
    stacked = stack(fused, UserAdapter("", judgement.weights), torch.float32)
    with attached(model, stacked) as here:
        return mean_loss(here.model, samples)


def test_what_is_learnt_shows_when_it_is_served_and_the_model_is_left_as_it_was(
    model: Any, fused: LoraWeights, samples: list[Example], encode: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judgement = train_user(model, fused, samples, CONFIG).finish()
    assert judgement.after < judgement.before
    later = [encode(f"question {n}", f"{n} yes yes yes") for n in range(10, 16)]
    with attached(model, fused) as alone:
        merged = mean_loss(alone.model, later)
    assert served_loss(model, fused, judgement, later) < merged
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("times", [1, 3])  # judged in folds, and by what is held out
def test_what_lowers_no_held_out_loss_is_rejected(
    model: Any, fluent: LoraWeights, samples: list[Example], times: int
) -> None:
    """The rate is one that can only spoil what is fluent."""
    judgement = train_user(model, fluent, samples * times, replace(CONFIG, learning_rate=0.1)).finish()
    assert judgement.weights is None
    assert judgement.after >= judgement.before


@pytest.mark.parametrize("count", [2, 10, MAX_FOLDED + 5])
def test_the_same_job_twice_gives_the_same_bytes(model: Any, fused: LoraWeights, encode: Any, count: int) -> None:
    samples = [encode(f"question {n}", f"{n} yes yes yes") for n in range(count)]
    layout = RowLayout(linear_modules(model), 4, shared_a=True)

    def raw() -> bytes:
        weights = train_user(model, fused, samples, replace(CONFIG, steps=4)).finish().weights
        assert weights is not None
        return encode_user_adapter(layout, UserAdapter("", weights))

    first = raw()
    torch.rand(3)  # global randomness plays no part
    assert raw() == first


@pytest.mark.parametrize("count", [10, MAX_FOLDED + 5])
def test_progress_counts_every_step_up_to_its_end_and_shows_life_between_while_held_out_samples_are_read(
    model: Any, fused: LoraWeights, encode: Any, count: int
) -> None:
    samples = [encode(f"question {n}", f"{n} yes yes yes") for n in range(count)]
    told = list(train_user(model, fused, samples, CONFIG))
    jumps = [later.step - earlier.step for earlier, later in pairwise(told)]
    assert told[0].step == 0 and set(jumps) == {0, 1}
    assert 0 in jumps[jumps.index(1) :]
    assert all(progress.step <= progress.of for progress in told if progress.step)
    assert told[-1].step == told[-1].of


@pytest.mark.parametrize("count", [10, MAX_FOLDED + 5])
def test_training_ends_when_the_held_out_loss_has_stopped_falling(
    model: Any, fused: LoraWeights, encode: Any, count: int
) -> None:
    """What is to be learnt has no pattern, so that every further step only learns by heart."""
    chance = random.Random(0)
    samples = [encode(f"question {n}", "".join(chance.choices("abcdefgh", k=12))) for n in range(count)]
    long = replace(CONFIG, steps=200, learning_rate=0.05)
    training = train_user(model, fused, samples, long)
    told = list(steps(training))
    assert 0 < len(told) < 200
    assert told[-1].step <= told[-1].of
    judgement = training.judgement
    if count > MAX_FOLDED and judgement:  # the weights are those of the best look, which was not the last
        order = random.Random(long.seed).sample(range(count), count)
        aside = [samples[place] for place in order[: round(long.holdout * count)]]
        assert judgement.steps < len(told)
        assert served_loss(model, fused, judgement, aside) == pytest.approx(judgement.after, rel=1e-3)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("count", [1, 10, MAX_FOLDED + 5])
def test_training_that_is_left_ends_there_and_detaches(
    model: Any, fused: LoraWeights, encode: Any, count: int, step: int
) -> None:
    """After a row that was read before the first step, or after that step."""
    names, samples = [name for name, _ in model.named_modules()], [encode(f"question {n}", "yes") for n in range(count)]
    training = train_user(model, fused, samples, CONFIG)
    for progress in training:
        assert [name for name, _ in model.named_modules()] != names
        if progress.step == step:
            break
    assert progress.step == step
    assert training.judgement is None
    assert [name for name, _ in model.named_modules()] == names


def test_what_is_raised_while_training_is_watched_ends_it_there_and_detaches(
    model: Any, fused: LoraWeights, samples: list[Example]
) -> None:
    names, seen = [name for name, _ in model.named_modules()], 0

    class Late(Exception): ...

    with pytest.raises(Late):
        for _ in steps(train_user(model, fused, samples, CONFIG)):
            seen += 1
            raise Late
    assert seen == 1
    assert [name for name, _ in model.named_modules()] == names


def test_a_loss_that_is_no_number_is_an_error_with_the_step(
    model: Any, fused: LoraWeights, samples: list[Example]
) -> None:
    broken = replace(fused, b={name: b * float("inf") for name, b in fused.b.items()})
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower"):
        train_user(model, broken, samples, CONFIG).finish()


def test_a_loss_that_explodes_is_an_error_that_names_the_rate(
    model: Any, fluent: LoraWeights, samples: list[Example]
) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: the loss is .* lower the learning rate"):
        train_user(model, fluent, samples, replace(CONFIG, learning_rate=50.0)).finish()


def test_a_last_step_that_leaves_no_numbers_is_an_error(model: Any, fused: LoraWeights, samples: list[Example]) -> None:
    """No loss is taken after it: the last run learns from all samples."""

    training = train_user(model, fused, samples, CONFIG)
    with pytest.raises(TrainingError, match="the weights are not finite after the last step"):
        for progress in steps(training):
            if progress.step == progress.of:
                with torch.no_grad():
                    for parameter in (p for p in model.parameters() if p.requires_grad):
                        parameter.fill_(torch.nan)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"rank": 0}, {"rank": "2"}, {"learning_rate": -1e-3}, {"holdout": 1.0}, {"seed": None}],
    ids=str,
)
def test_a_configuration_that_makes_no_training_is_refused_and_names_the_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=rf"{next(iter(wrong))} must be .*, got "):
        replace(CONFIG, **wrong)


def test_one_sample_is_judged_on_itself_and_none_is_an_error(
    model: Any, fused: LoraWeights, samples: list[Example]
) -> None:
    judgement = train_user(model, fused, samples[:1], CONFIG).finish()
    assert judgement.after < judgement.before
    with pytest.raises(TrainingError, match="no samples"):
        train_user(model, fused, [], CONFIG)
