"""What is learnt from a person: their items, a share of them with their past in the prompt, as it is served."""

from __future__ import annotations

import pytest

from bank.building.options import BuildOptions
from bank.building.resume import inputs_key
from bank.building.rows import pooled_lessons
from bank.items.histories import History
from bank.items.lessons import Lesson, PastItems, encode_with_memories, lessons
from bank.items.profile import parse_item
from bank.items.prompt import encode_pair
from bank.items.tasks import PAST_COUNTS, get_task
from bank.manifest import PosteriorRule
from tests.unit.bank.test_prompt import CharTokenizer

CHAT = get_task("chat")
SUBJECTS = ("bread", "harbour", "roses", "bread again", "the harbour at night", "more roses")


def person(*subjects: str) -> History:
    raw = [{"input": f"And {subject}?", "output": f"{place}, on {subject}"} for place, subject in enumerate(subjects)]
    return History("ann", tuple(parse_item(item, CHAT, place) for place, item in enumerate(raw)))


def quoted(place: int, subject: str) -> str:
    return f'"{place}, on {subject}" is the answer to "And {subject}?"'


def shown(lesson: Lesson, max_tokens: int = 1000) -> str:
    tokenizer = CharTokenizer()
    return tokenizer.decode(list(lesson.example(tokenizer, max_tokens).ids))


def test_without_history_an_item_is_its_pair_alone() -> None:
    learnt = lessons(person(*SUBJECTS), CHAT, share=0, seed=0)
    for lesson, (turn, output) in zip(learnt, person(*SUBJECTS).pairs(CHAT), strict=True):
        assert lesson.example(CharTokenizer(), 100) == encode_pair(CharTokenizer(), turn, output, 100)


def test_with_history_the_most_relevant_earlier_items_stand_before_the_turn_and_carry_no_loss() -> None:
    lesson = lessons(person(*SUBJECTS), CHAT, share=1, seed=0)[3]
    assert shown(lesson).startswith(f"<user>{quoted(0, 'bread')}")
    assert shown(lesson).endswith(". And bread again?<end>\n<assistant>3, on bread again<end>\n".rstrip())
    example = lesson.example(CharTokenizer(), 1000)
    assert CharTokenizer().decode(list(example.ids[example.loss_from :])) == "3, on bread again<end>"


@pytest.mark.parametrize("seed", range(8))
def test_no_item_sees_itself_or_what_came_later(seed: int) -> None:
    subjects = ["the same"] * 6
    for place, lesson in enumerate(lessons(person(*subjects), CHAT, share=1, seed=seed)):
        seen = [n for n in range(6) if f'"{n}, on' in shown(lesson)]
        assert seen == sorted(seen)[: max(PAST_COUNTS["text"])]
        assert all(n < place for n in seen)
        assert bool(seen) == (place > 0)


def test_of_an_item_that_is_there_twice_the_first_one_counts_and_of_a_turn_that_is_none_all_are_the_past() -> None:
    twice = History("ann", (*person("bread", "roses").items, *person("bread").items))
    seen = [bool(lesson.past.memories(lesson.turn, lesson.output)) for lesson in lessons(twice, CHAT, 1, 0)]
    assert seen == [False, True, False]
    past = PastItems(CHAT, person(*SUBJECTS).items, share=1, seed=0)
    assert past.memories("And more roses?", "something else")[0] == quoted(5, "more roses")


def test_the_share_is_of_the_items_and_most_get_one() -> None:
    many = lessons(person(*(f"subject {n}" for n in range(600))), CHAT, share=0.5, seed=0)
    counts = [len(lesson.past.memories(lesson.turn, lesson.output)) for lesson in many]
    assert 0.4 < sum(count > 0 for count in counts) / len(counts) < 0.6
    one, two, three = (counts.count(n) for n in (1, 2, 3))
    assert one > two + three > three > 0


def test_the_seed_decides_for_each_item_whatever_the_others_are() -> None:
    first, again, other, short = (
        [shown(lesson) for lesson in lessons(person(*SUBJECTS[:n]), CHAT, share=0.5, seed=seed)]
        for seed, n in ((3, 6), (3, 6), (1, 6), (3, 4))
    )
    assert first == again != other
    assert short == first[:4]


def test_memories_that_do_not_fit_make_way_for_the_next_and_the_turn_stays_whole() -> None:
    memories = ["m" * 50, "n" * 10, "o" * 5]

    def prompt(max_tokens: int) -> str:
        found = encode_with_memories(CharTokenizer(), CHAT, "hi", "yo", memories=memories, max_tokens=max_tokens)
        assert len(found.ids) <= max_tokens
        return CharTokenizer().decode(list(found.ids[6 : found.loss_from]))

    m, n, o = memories
    wanted = {1000: f"{m}, and {n}, and {o}. hi", 60: f"{n}, and {o}. hi", 50: f"{n}. hi", 38: "hi"}
    assert {longest: prompt(longest).removesuffix("<end>\n<assistant>") for longest in wanted} == wanted


def test_a_build_pools_everybodys_and_nobody_sees_anothers() -> None:
    ann, bob = person(*SUBJECTS), History("bob", person("bread", "roses").items)
    pooled = pooled_lessons([ann, bob], CHAT, BuildOptions("chat", history_share=1.0))
    assert len(pooled) == 8
    assert shown(pooled[6]).startswith("<user>And bread?")


def test_a_key_tells_apart_what_would_be_another_bank() -> None:
    def key(aside: str = "bread", model: str = "model", **changes: object) -> str:
        options = BuildOptions("chat", **changes)  # type: ignore[arg-type]
        return inputs_key(options, CHAT, [person(*SUBJECTS)], [person(aside)], (model, "prompts", "embedder"))

    others = [key("roses"), key(model="another"), key(history_share=1.0), key(anchors_by="longest"), key(describe=True)]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(verdict=False)  # who is left out says that


def test_the_rule_is_topics_then_the_posterior_unless_a_signature_would_be_too_long() -> None:
    rule = BuildOptions("citation", anchors=1024).rule()
    assert (rule.anchors, rule.strength, rule.posterior) == (2, 0.5, PosteriorRule(anchors=1024, decay=250.0))
    assert BuildOptions("citation", anchors=1025).rule().posterior is None
    assert BuildOptions("citation", anchors=1).rule().anchors == 1
