"""User adapters on a tiny model: they help, are judged, and leave the model as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, RowLayout
from adapters.training import user_trainer
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.loss import b_gradient, mean_loss
from adapters.training.trainer import TrainPlan, initial_lora, linear_modules, train_lora
from adapters.training.user_trainer import (
    IN_USE,
    MIN_JUDGES,
    Beneath,
    BeneathWithout,
    Judgement,
    TrainingProgress,
    TrainingRun,
    _Fold,
    judge,
    train_user,
)
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack
from tests.integration.training.conftest import modules_of, snapshot

CONFIG = AdaptConfig(rank=2, steps=8, learning_rate=2e-2, holdout=0.2, seed=0)
MANY = MAX_FOLDED + 5  # of which some are trained on in both folds


@pytest.fixture(scope="module")
def mannered(encode: Any) -> Callable[..., list[Example]]:
    ends = (" yes yes yes", " yes yes yes yes yes yes yes yes yes")  # samples are of different lengths
    return lambda count, first=0: [
        encode(f"question {n}", f"{n}{ends[n % 3 == 1]}") for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def samples(mannered: Callable[..., list[Example]]) -> list[Example]:
    return mannered(10)


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


def on(fused: LoraWeights, **rivals: LoraWeights | None) -> BeneathWithout:
    everybody = {"merged": fused} | rivals
    return lambda held: Beneath(fused, {name: partial(lambda lora: lora, lora) for name, lora in everybody.items()})


def loss_with(model: Any, lora: LoraWeights, samples: Sequence[Example]) -> float:
    with attached(model, lora) as here:
        return mean_loss(here.model, samples)


def stacked(fused: LoraWeights, judgement: Judgement) -> LoraWeights:
    """The adapter as it would be served, in float32."""
    assert judgement.weights is not None
    return stack(fused, UserAdapter("", judgement.weights), torch.float32)


def test_what_is_learnt_is_served_and_the_model_is_restored(
    model: Any, fused: LoraWeights, samples: list[Example], mannered: Callable[..., list[Example]]
) -> None:
    before = snapshot(model)
    judgement = train_user(model, on(fused), samples, CONFIG).finish()
    assert judgement.before and judgement.after and judgement.after < judgement.before
    later = mannered(6, 10)
    assert loss_with(model, stacked(fused, judgement), later) < loss_with(model, fused, later)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rival", ["the merged adapter", "the common row", IN_USE])
def test_an_adapter_worse_than_what_is_served_is_not_promoted(
    model: Any, fused: LoraWeights, fluent: LoraWeights, samples: list[Example], rival: str
) -> None:
    """It lowers the loss of what it is trained on, which nobody is served."""
    judgement = train_user(model, on(fused, **{rival: fluent}), samples, replace(CONFIG, steps=2)).finish()
    assert judgement.weights is None
    assert rival in judgement.reason
    assert judgement.before == pytest.approx(loss_with(model, fluent, samples), rel=1e-4)
    assert judgement.served == (judgement.before if rival == IN_USE else None)
    assert judgement.before < judgement.after < loss_with(model, fused, samples)  # type: ignore[operator]


@pytest.mark.parametrize("count", [1, MIN_JUDGES - 1])
def test_samples_too_few_to_judge_train_and_promote_nothing(
    model: Any, fused: LoraWeights, samples: list[Example], count: int
) -> None:
    training = train_user(model, on(fused), samples[:count], CONFIG)
    assert list(training) == []
    assert training.judgement
    assert (training.judgement.weights, training.judgement.after) == (None, None)
    assert f"at least {MIN_JUDGES}" in training.judgement.reason


def test_what_judges_neither_trains_nor_is_evidence_beneath(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, asked, trained = mannered(MANY), list[set[int]](), list[set[Example]]()
    optimise = user_trainer.optimise

    def beneath(held: Sequence[int]) -> Beneath:
        asked.append(set(held))
        return Beneath(fused, {"merged": lambda: fused})

    def noted(model: Any, parameters: Any, kept: Sequence[Example], *args: Any, **more: Any) -> Any:
        trained.append(set(kept))
        return optimise(model, parameters, kept, *args, **more)

    monkeypatch.setattr(user_trainer, "optimise", noted)
    train_user(model, beneath, samples, CONFIG, judges=range(9, MANY)).finish()
    one, other, everybody = asked
    assert (len(one), len(other), everybody) == (8, 8, set())
    assert not one & other and one | other == set(range(9, MANY))
    assert trained == [{samples[n] for n in range(MANY) if n not in held} for held in asked]


def test_the_other_folds_samples_choose_the_steps_that_count() -> None:
    """Each fold's own best step would have looked better than it is."""
    one = _Fold([1, 1], {2: [1.0, 1.0], 4: [3.0, 3.0]}, {"merged": [2.0, 2.0]})
    other = _Fold([1, 1], {2: [3.0, 3.0], 4: [1.0, 1.0]}, {"merged": [2.0, 2.0]})
    judgement = judge([one, other])
    assert (judgement.before, judgement.after) == (2.0, 3.0)
    assert judgement.reason


@pytest.mark.parametrize(("gains", "is_sure"), [([1.0, 1.0, 1.0, 1.2], True), ([4.0, -2.0, 3.0, -3.0], False)])
def test_a_gain_must_exceed_its_standard_error(gains: list[float], is_sure: bool) -> None:
    folds = [_Fold([1, 1], {1: [5.0 - gain for gain in part]}, {"m": [5.0, 5.0]}) for part in (gains[:2], gains[2:])]
    assert (judge(folds).reason == "") is is_sure


@pytest.mark.parametrize("times", [1, 3])  # all are judges, or a part
def test_what_lowers_no_loss_is_rejected(model: Any, fluent: LoraWeights, samples: list[Example], times: int) -> None:
    """The rate is one that can only spoil what is fluent."""
    judgement = train_user(model, on(fluent), samples * times, replace(CONFIG, learning_rate=0.1)).finish()
    assert judgement.weights is None
    assert judgement.before and judgement.after and judgement.after >= judgement.before


@pytest.mark.parametrize("count", [MIN_JUDGES, 10, MANY])
def test_a_job_twice_gives_the_same_bytes_and_the_same_steps(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int
) -> None:
    layout, raw = RowLayout(linear_modules(model), 4, shared_a=True), []
    for _ in range(2):
        training = train_user(model, on(fused), mannered(count), replace(CONFIG, steps=4))
        told = list(training)
        assert training.judgement and training.judgement.weights
        raw.append(encode_user_adapter(layout, UserAdapter("", training.judgement.weights)))
        torch.rand(3)  # global randomness plays no part
    assert raw[0] == raw[1]
    jumps = [later.step - earlier.step for earlier, later in pairwise(told)]
    assert told[0].step == 0 and set(jumps) == {0, 1}
    assert 0 in jumps[jumps.index(1) :]  # while held-out samples are read
    assert all(progress.step <= progress.of for progress in told if progress.step)
    assert told[-1].step == told[-1].of


@pytest.mark.parametrize("count", [10, MANY])
def test_training_ends_when_the_loss_stops_falling(model: Any, fused: LoraWeights, encode: Any, count: int) -> None:
    """What is to be learnt has no pattern, so that every further step only learns by heart."""
    chance = random.Random(0)
    samples = [encode(f"question {n}", "".join(chance.choices("abcdefgh", k=12))) for n in range(count)]
    long = replace(CONFIG, steps=200, learning_rate=0.05)
    training = train_user(model, on(fused), samples, long)
    told = list(steps(training))
    assert 0 < len(told) < 200
    assert told[-1].step <= told[-1].of


@pytest.mark.parametrize("step", [0, 1])  # after a row that was read before the first step, or after that step
@pytest.mark.parametrize("count", [10, MANY])
def test_training_that_is_left_or_interrupted_detaches(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int, step: int
) -> None:
    names = modules_of(model)
    for error in (None, KeyError):
        training = train_user(model, on(fused), mannered(count), CONFIG)
        with suppress(KeyError):
            for progress in islice(training, 1, None):  # nothing is attached during the signature
                if progress.step == step:
                    assert modules_of(model) != names
                    if error:
                        raise error
                    break
        assert progress.step == step
        assert training.judgement is None
        assert modules_of(model) == names


@pytest.mark.parametrize("count", [10, MANY])
def test_signatures_between_change_no_byte_of_a_run(
    quick: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int
) -> None:
    layout, raw = RowLayout(linear_modules(quick), 4, shared_a=True), []
    common = initial_lora(layout.modules, 4, seed=1)
    alone = b_gradient(quick, layout, common, mannered(3))
    for is_interrupted in (False, True):
        training = train_user(quick, on(fused), mannered(count), replace(CONFIG, steps=4))
        for _ in training:
            assert not is_interrupted or torch.equal(b_gradient(quick, layout, common, mannered(3)), alone)
        assert training.judgement and training.judgement.weights
        raw.append(encode_user_adapter(layout, UserAdapter("", training.judgement.weights)))
    assert raw[0] == raw[1]
    assert torch.equal(b_gradient(quick, layout, common, mannered(3)), alone)


def test_a_loss_that_explodes_or_is_none_names_the_step(
    model: Any, fused: LoraWeights, fluent: LoraWeights, samples: list[Example]
) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: the loss is .* lower the learning rate"):
        train_user(model, on(fluent), samples, replace(CONFIG, learning_rate=50.0)).finish()
    broken = replace(fused, b={name: b * float("inf") for name, b in fused.b.items()})
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower"):
        train_user(model, on(broken), samples, CONFIG).finish()
    training = train_user(model, on(fused), samples, CONFIG)  # of the last run, on all samples, no loss is taken
    with pytest.raises(TrainingError, match="the weights are not finite after the last step"):
        for progress in steps(training):
            if progress.step == progress.of:
                with torch.no_grad():
                    for parameter in (p for p in model.parameters() if p.requires_grad):
                        parameter.fill_(torch.nan)


def test_what_makes_no_training_is_refused_and_names_the_value(model: Any, fused: LoraWeights) -> None:
    with pytest.raises(TrainingError, match="no samples"):
        train_user(model, on(fused), [], CONFIG)
