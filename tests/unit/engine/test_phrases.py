"""Phrase tables in a batch: the mixture is the dense one, nobody gets another's, and both runners mix alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from bank.lookup.phrases import Phrases, Reader, TrustedPhrases, phrase_table
from server.engine.phrases.gpu_processor import GpuPhraseProcessor
from server.engine.phrases.processor import PhraseProcessor
from server.engine_protocol import PHRASES, TRUST, phrase_arguments

VOCABULARY, ROWS, PROMPT = 12, 4, [7, 7, 3]
TRUSTED = (0.3, 0.5, 0.8, 0.9)
TEXTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=2, max_size=5)
ANSWER = st.lists(st.integers(0, 4), max_size=6)
CPU = torch.device("cpu")


def asking(table: Phrases | None) -> SamplingParams:
    return SamplingParams(extra_args=None if table is None else phrase_arguments(TrustedPhrases(table, TRUSTED)))


def mixed(logits: torch.Tensor, table: Phrases, answer: Sequence[int]) -> torch.Tensor:
    """The probabilities of one row [V] by the formula, from all of them."""
    reader = Reader(table)
    for token in answer:
        reader.read(token)
    proposing = reader.proposing()
    weights = torch.from_numpy(TrustedPhrases(table, TRUSTED).weights[proposing])
    probabilities = (1 - weights.sum()) * logits.softmax(-1)
    return probabilities.index_add(0, torch.tensor(table["token"][proposing].astype("i8"), dtype=torch.long), weights)


@dataclass
class FirstRunner:
    """vLLM's bookkeeping of a batch on the host."""

    outputs: dict[int, list[int]] = field(default_factory=dict)  # by row

    def __post_init__(self) -> None:
        model = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS), model_config=model)
        self.processor = PhraseProcessor(config, CPU, is_pin_memory=False)

    def update(self, **changes: Sequence[Any]) -> None:
        self.processor.update_state(BatchUpdate(ROWS, **{"removed": (), "added": (), "moved": ()} | changes))

    def add(self, row: int, table: Phrases | None, answer: Sequence[int] = ()) -> list[int]:
        output = list(answer)
        self.update(added=[(row, asking(table), PROMPT, output)])
        return output

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processor.apply(logits.clone()).softmax(-1)


class SecondRunner:
    """vLLM's bookkeeping of a batch on the device."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(ROWS, 64, dtype=torch.int32)
        lengths = [SimpleNamespace(np=(of := np.zeros(ROWS, np.int32)), gpu=torch.from_numpy(of)) for _ in range(2)]
        self.prompt_len, self.prefill_len = lengths
        states = SimpleNamespace(
            max_num_reqs=ROWS,
            vocab_size=VOCABULARY,
            device=CPU,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            prompt_len=self.prompt_len,
            prefill_len=self.prefill_len,
        )
        self.processor = GpuPhraseProcessor(None, states)
        self.total = np.zeros(ROWS, np.int64)

    def add(self, slot: int, table: Phrases | None, answer: Sequence[int] = ()) -> None:
        whole = [*PROMPT, *answer]
        self.tokens[slot, : len(whole)] = torch.tensor(whole)
        self.prompt_len.np[slot], self.prefill_len.np[slot], self.total[slot] = len(PROMPT), len(whole), len(whole)
        self.processor.add_request(slot, asking(table))

    def go_on(self, slot: int, token: int) -> None:
        self.tokens[slot, self.total[slot]] = token
        self.total[slot] += 1

    def probabilities(self, logits: torch.Tensor, slots: Sequence[int], lengths: Sequence[int] = ()) -> torch.Tensor:
        self.processor.apply_staged_writes()
        mapping = np.array(slots)
        read = torch.tensor(lengths or self.total[mapping].tolist())
        context = SimpleNamespace(idx_mapping_np=mapping, expanded_idx_mapping=torch.from_numpy(mapping), pos=read - 1)
        return self.processor.apply(logits.clone(), context).softmax(-1)


def test_shares_of_more_than_one_leave_numbers() -> None:
    table = phrase_table([[1, 2], [1, 2], [1, 3], [1, 3]])
    table["share"] = 255
    runner = FirstRunner()
    runner.add(0, table, [1])
    assert runner.probabilities(torch.zeros(1, VOCABULARY)).isfinite().all()


@given(texts=TEXTS, answer=ANSWER, seed=st.integers(0, 99))
def test_the_mixture_is_the_dense_one_in_both_runners(texts: list[list[int]], answer: list[int], seed: int) -> None:
    table, first, second = phrase_table(texts), FirstRunner(), SecondRunner()
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    output = first.add(0, table)
    second.add(2, table)
    for place in range(len(answer) + 1):
        wanted = mixed(logits[0], table, answer[:place])
        for found in (first.probabilities(logits), second.probabilities(logits, [2])):
            torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=1e-5)
        for token in answer[place : place + 1]:
            output.append(token)
            second.go_on(2, token)


@given(texts=TEXTS, answer=ANSWER)
def test_an_answer_that_was_preempted_goes_on_as_before(texts: list[list[int]], answer: list[int]) -> None:
    table, first, second = phrase_table(texts), FirstRunner(), SecondRunner()
    logits = torch.zeros(1, VOCABULARY)
    first.add(1, None)
    first.add(0, table, answer)
    second.add(0, table, answer)
    if answer:  # its prompt and what it had are read again, in parts
        second.probabilities(logits, [0], [len(PROMPT) + len(answer) - 1])
    wanted = mixed(logits[0], table, answer)
    torch.testing.assert_close(first.probabilities(logits)[0], wanted)
    torch.testing.assert_close(second.probabilities(logits, [0])[0], wanted)


def test_each_row_gets_its_own_table_wherever_it_moves() -> None:
    tables = [phrase_table([[token, token + 1]] * 2) for token in range(3)]
    runner, logits = FirstRunner(), torch.zeros(ROWS, VOCABULARY)
    plain = logits.softmax(-1)[0]

    def likeliest() -> list[int | None]:
        found = runner.probabilities(logits)
        return [None if torch.allclose(row, plain) else int(row.argmax()) for row in found]

    for row, table in enumerate(tables):
        runner.add(row, table)
    assert likeliest() == [0, 1, 2, None]
    runner.update(moved=[(0, 2, MoveDirectionality.SWAP)])
    assert likeliest() == [2, 1, 0, None]
    runner.update(removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)])
    assert likeliest() == [2, 0, None, None]
    runner.add(0, None)
    runner.add(3, tables[1])
    assert likeliest() == [None, 0, None, 1]
    runner.update(added=[(row, asking(tables[row % 3]), PROMPT, []) for row in (3, 2, 1, 0)])  # all at once
    assert likeliest() == [0, 1, 2, 0]


def test_a_slot_of_the_device_keeps_nothing_of_the_one_before() -> None:
    table, runner, logits = phrase_table([[1, 2]] * 2), SecondRunner(), torch.zeros(2, VOCABULARY)
    plain = logits.softmax(-1)
    runner.add(3, table)
    runner.add(0, None)
    found = runner.probabilities(logits, [0, 3])
    torch.testing.assert_close(found[0], plain[0])
    assert found[1].argmax() == 1
    runner.add(3, None)
    torch.testing.assert_close(runner.probabilities(logits, [3, 0]), plain)


@pytest.mark.parametrize("runner", [FirstRunner, SecondRunner])
def test_what_is_masked_stays_impossible(runner: type) -> None:
    made, logits = runner(), torch.zeros(1, VOCABULARY)
    logits[0, 5] = -torch.inf
    made.add(0, phrase_table([[5, 5]] * 2))
    found = made.probabilities(logits, *([[0]] if runner is SecondRunner else []))
    assert found[0, 5] == 0


def test_phrases_with_tokens_that_the_model_lacks_are_left_out() -> None:
    runner, logits = FirstRunner(), torch.zeros(1, VOCABULARY)
    runner.add(0, phrase_table([[VOCABULARY, 1]] * 2))
    torch.testing.assert_close(runner.probabilities(logits), logits.softmax(-1))


@pytest.mark.parametrize(
    "arguments",
    [{PHRASES: "no base64!"}, {PHRASES: "AAAA"}, {PHRASES: ""}, {PHRASES: "", TRUST: [1, 0, 0, 0]}],
)
@pytest.mark.parametrize("processor", [PhraseProcessor, GpuPhraseProcessor])
def test_a_request_with_something_else_is_refused(processor: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        processor.validate_params(SamplingParams(extra_args=arguments))
