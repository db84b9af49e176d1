"""Prompts: what training sees is what serving sees, past items in LaMP's words, and only the answer carries loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from bank.building.options import BuildOptions
from bank.building.rows import RowTrainer
from bank.errors import BankError
from bank.items.histories import History
from bank.items.lessons import Lesson, PastItems, encode_with_memories, lessons
from bank.items.profile import Item, parse_item
from bank.items.prompt import chat_messages, encode_conversation, encode_pair
from bank.items.retrieval import ItemIndex, turn_with_memories
from bank.items.tasks import PAST_COUNTS, Task, get_task, tasks
from tests.support.bank_bench import Recorder

CHAT, NEWS, STARS = get_task("chat"), get_task("news_headline"), get_task("movie_rating")
TURN = "Generate a headline for the following article: A dog slept through the race."
ITEMS = [
    parse_item({"title": "Cats Win", "text": "A cat won a contest."}, NEWS, 0),
    parse_item({"title": "Dogs Lose", "text": "A dog lost a race."}, NEWS, 1),
    parse_item({"text": "No headline here about a dog and a race."}, NEWS, 2),
]
SUBJECTS = ("bread", "harbour", "roses", "bread again", "the harbour at night", "more roses")


class CharTokenizer:
    """One id per character, under a chat template of its own."""

    def __init__(
        self, close: str = "<end>\n", eos_token: str | None = "</s>", strips: bool = False, thought: str = ""
    ) -> None:
        self.close, self.eos_token, self.strips, self.thought = close, eos_token, strips, thought

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        said = [(m["role"], m["content"].strip() if self.strips else m["content"]) for m in conversation]
        opened = {"user": "<user>", "assistant": f"<assistant>{self.thought}"}
        text = "".join(f"{opened[role]}{content}{self.close}" for role, content in said)
        return text + ("<assistant>" if add_generation_prompt else "")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(i) for i in token_ids)


class GreedyTokenizer(CharTokenizer):
    """Under a template with a default system prompt, and white space that sticks together."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        has_system = conversation[0]["role"] == "system"
        system = conversation[0]["content"] if has_system else "be kind"
        rest = super().apply_chat_template(
            conversation[has_system:], tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )
        return f"<s>{system}\n{rest.replace('<user>', '<user>' + chr(10))}"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [hash(piece) for piece in re.findall(r"\s+|\S", text)]


@pytest.mark.parametrize(
    ("system", "turn", "shared"),
    [
        (None, "hi", "<s>be kind\n<user>"),
        ("Answer in rhymes.", "hi", "<s>Answer in rhymes.\n<user>"),
        ("Answer in rhymes.", "\n\nhi", "<s>Answer in rhymes.\n<user>"),
        ("", "a", "<s>\n<user>"),
    ],
)
def test_the_system_prompt_is_what_all_turns_share(system: str | None, turn: str, shared: str) -> None:
    tokenizer: Any = GreedyTokenizer()
    before = [] if system is None else [{"role": "system", "content": system}]
    example = encode_conversation(tokenizer, [*before, *chat_messages(turn)], "yes")
    assert example.ids[: example.system] == tuple(tokenizer.encode(shared, add_special_tokens=False))
    later = encode_conversation(
        tokenizer, [*before, *chat_messages(turn), {"role": "assistant", "content": "no"}, *chat_messages("why")], "so"
    )
    assert later.system == example.system


def split(tokenizer: CharTokenizer, turn: str, output: str, max_tokens: int = 1000) -> tuple[str, str]:
    pair = encode_pair(tokenizer, turn, output, max_tokens)
    assert len(pair.ids) <= max_tokens
    return tokenizer.decode(list(pair.ids[: pair.loss_from])), tokenizer.decode(list(pair.ids[pair.loss_from :]))


@pytest.mark.parametrize(
    ("tokenizer", "output", "rendered"),
    [
        (CharTokenizer(), "yo", ("<user>hi<end>\n<assistant>", "yo<end>")),
        (CharTokenizer(strips=True), " yo ", ("<user>hi<end>\n<assistant>", " yo <end>")),
        (CharTokenizer(thought="<think></think>"), "hi", ("<user>hi<end>\n<assistant>", "hi<end>")),
        (CharTokenizer(close="\n"), "yo", ("<user>hi\n<assistant>", "yo</s>")),  # no end of turn: the end of text
        (CharTokenizer(close="", eos_token=None), "yo", ("<user>hi<assistant>", "yo")),
        *((CharTokenizer(), odd, ("<user>hi<end>\n<assistant>", f"{odd}<end>")) for odd in ("a<end>b", "<assistant>")),
    ],
)
def test_only_output_and_end_of_turn_have_loss(tokenizer: CharTokenizer, output: str, rendered: object) -> None:
    assert chat_messages("hi") == [{"role": "user", "content": "hi"}]
    served = tokenizer.apply_chat_template(chat_messages("hi"), tokenize=False, add_generation_prompt=True)
    found = split(tokenizer, "hi", output)
    assert (found, found[0]) == (rendered, served)


def test_a_long_turn_loses_its_end_and_never_the_template() -> None:
    prompt, output = split(CharTokenizer(), "x" * 100, "yo", max_tokens=60)
    assert prompt.startswith("<user>xxx")
    assert prompt.endswith("x<end>\n<assistant>")
    assert output == "yo<end>"
    assert len(prompt + output) == 60
    prompt, output = split(CharTokenizer(), "x" * 100, "y" * 100, max_tokens=60)  # the output alone is too long
    assert (prompt, output) == ("<user><end>\n<assistant>", "y" * (60 - len(prompt)))


def test_turn_cut_within_a_character_leaves_the_output_whole() -> None:
    class Bytes(CharTokenizer):  # half a character is decoded as three bytes
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

        def decode(self, token_ids: list[int]) -> str:
            return bytes(token_ids).decode(errors="replace")

    assert all(split(Bytes(), "\N{SURFER}" * 20, "yo", longest)[1] == "yo<end>" for longest in range(52, 64))


def with_history(task: Task, turn: str, items: Sequence[Item], count: int) -> str:
    return turn_with_memories(task, turn, ItemIndex(task, items).memories(turn, count))


def test_history_quotes_the_best_earlier_items_before_the_turn() -> None:
    dogs = '"Dogs Lose" is the title for "A dog lost a race."'
    cats = '"Cats Win" is the title for "A cat won a contest."'
    assert with_history(NEWS, TURN, ITEMS, 1) == f"{dogs}. {TURN}"
    assert with_history(NEWS, TURN, ITEMS, 5) == f"{dogs}, and {cats}. {TURN}"
    pair = parse_item({"input": "Any plans?", "output": "The sea."}, NEWS, 0)  # is quoted as in a chat
    assert with_history(NEWS, TURN, [pair], 1) == f'"The sea." is the answer to "Any plans?". {TURN}'
    for nothing, count in ((ITEMS, 0), ([], 3), (ITEMS[2:], 3)):
        assert with_history(NEWS, TURN, nothing, count) == TURN
    index = ItemIndex(NEWS, [ITEMS[2], *ITEMS[:2], *ITEMS[:2]])
    best = [index.memories("a dog and a cat", 9, lambda place, _: place < before) for before in range(6)]  # noqa: B023
    assert [len(found) for found in best] == [0, 0, 1, 2, 3, 4]
    assert best[2] == [cats]


@pytest.mark.parametrize(
    ("turn", "texts"),
    [
        ("我的猫不吃东西怎么办", ["今天我的猫生病了", "股市昨天大跌"]),
        ("うちの猫が食べない", ["昨日から猫が鳴いている", "株価が下がった"]),
        ("แมวไม่กินข้าว", ["เมื่อวานแมวป่วย", "หุ้นตกหนักมาก"]),
        ("मेरी बिल्ली खाती नहीं", ["बिल्ली बीमार है", "बाज़ार गिर गया"]),
        ("Моя кошка не ест", ["кошка болеет", "рынок упал"]),
    ],
)
def test_relevant_items_are_found_in_scripts_without_spaces(turn: str, texts: list[str]) -> None:
    items = [parse_item({"input": text, "output": "yes"}, CHAT, place) for place, text in enumerate(texts)]
    assert texts[0] in ItemIndex(CHAT, items).memories(turn, 1)[0]


@pytest.mark.parametrize("task", tasks().values(), ids=lambda task: task.name)
def test_items_of_another_banks_task_are_left_out_of_history(task: Task) -> None:
    elsewhere = [Item(name, dict.fromkeys(other.fields, "the sea")) for name, other in tasks().items()]
    assert "the sea" in with_history(task, f"{task.instruction} the sea", elsewhere, 16)


@pytest.mark.parametrize(
    ("turn", "texts", "best"),
    [
        ("zebra", ["a cat", "a dog", "a bird"], ["a bird", "a dog"]),
        ("the", ["the", "a"], ["a", "the"]),  # nothing but stop words
        ("my cat", ["a cat", "a dog", "a bird"], ["a cat", "a bird"]),
    ],
)
def test_of_equally_relevant_items_the_newest_comes_first(turn: str, texts: list[str], best: list[str]) -> None:
    items = [parse_item({"input": text, "output": "yes"}, CHAT, place) for place, text in enumerate(texts)]
    assert ItemIndex(CHAT, items).memories(turn, 2) == [f'"yes" is the answer to "{text}"' for text in best]


def person(*subjects: str) -> History:
    raw = [{"input": f"And {subject}?", "output": f"{place}, on {subject}"} for place, subject in enumerate(subjects)]
    return History("ann", tuple(parse_item(item, CHAT, place) for place, item in enumerate(raw)))


def quoted(place: int, subject: str) -> str:
    return f'"{place}, on {subject}" is the answer to "And {subject}?"'


def shown(lesson: Lesson) -> str:
    return CharTokenizer().decode(list(lesson.example(CharTokenizer(), 1000).ids))


def test_relevant_past_items_precede_the_turn_without_loss() -> None:
    learnt = lessons(person(*SUBJECTS), CHAT, fraction=0, seed=0)
    for lesson, (turn, output) in zip(learnt, person(*SUBJECTS).pairs(CHAT), strict=True):
        assert lesson.example(CharTokenizer(), 100) == encode_pair(CharTokenizer(), turn, output, 100)
    lesson = lessons(person(*SUBJECTS), CHAT, fraction=1, seed=0)[3]
    assert shown(lesson).startswith(f"<user>{quoted(0, 'bread')}")
    assert shown(lesson).endswith(". And bread again?<end>\n<assistant>3, on bread again<end>\n".rstrip())
    example = lesson.example(CharTokenizer(), 1000)
    assert CharTokenizer().decode(list(example.ids[example.loss_from :])) == "3, on bread again<end>"


@pytest.mark.parametrize("seed", range(4))
def test_no_item_sees_itself_or_what_came_later(seed: int) -> None:
    for place, lesson in enumerate(lessons(person(*["the same"] * 6), CHAT, fraction=1, seed=seed)):
        seen = [n for n in range(6) if f'"{n}, on' in shown(lesson)]
        assert seen == sorted(seen)[: max(PAST_COUNTS["text"])]
        assert all(n < place for n in seen)
        assert bool(seen) == (place > 0)


def test_first_duplicate_counts_and_a_new_turn_sees_all_items() -> None:
    twice = History("ann", (*person("bread", "roses").items, *person("bread").items))
    seen = [bool(lesson.past.memories(lesson.turn, lesson.output)) for lesson in lessons(twice, CHAT, 1, 0)]
    assert seen == [False, True, False]
    past = PastItems(CHAT, person(*SUBJECTS).items, fraction=1, seed=0)
    assert past.memories("And more roses?", "something else")[0] == quoted(5, "more roses")


LONG = "we leave at nine from the east door of the hall"


@pytest.mark.parametrize(
    ("task", "item", "turn", "output"),
    [
        (CHAT, {"input": "Any plans?", "output": "The sea."}, "Any plans?\n", "The sea."),
        (CHAT, {"input": "Any plans?", "output": "The sea."}, "And what are your plans?", "the  SEA.\n"),
        (
            NEWS,
            {"text": "A dog lost a race.", "title": "Dogs Lose"},
            "Headline, please: A dog lost a race.",
            "Dogs lose",
        ),
        (CHAT, {"input": "When?", "output": f"Hello! {LONG}. Bye"}, "When do we leave?", LONG.upper()),
        (
            CHAT,
            {"input": "时间?", "output": "我们九点从大厅的东门出发, 再见"},
            "什么时候出发?",
            "我们九点从大厅的东门出发",
        ),
        (STARS, {"text": "a film", "score": "4"}, f"{STARS.instruction}a  film", " 4"),
    ],
)
def test_no_memory_tells_the_answer_that_is_asked_for(task: Task, item: Any, turn: str, output: str) -> None:
    past = PastItems(task, [parse_item(item, task, 0)], fraction=1, seed=0)
    assert past.memories(turn, output) == []
    assert past.memories(turn, "another") != []


def test_short_answer_in_a_text_and_equal_label_are_quoted() -> None:
    past = PastItems(CHAT, [parse_item({"input": "Any plans?", "output": "The sea, always."}, CHAT, 0)], 1, 0)
    assert past.memories("Where to?", "the sea") != []
    stars = PastItems(STARS, [parse_item({"text": "a film", "score": "4"}, STARS, 0)], 1, 0)
    assert stars.memories(f"{STARS.instruction}another film", "4") != []


def test_the_share_is_of_the_items_and_most_get_one() -> None:
    many = lessons(person(*(f"subject {n}" for n in range(600))), CHAT, fraction=0.5, seed=0)
    counts = [len(lesson.past.memories(lesson.turn, lesson.output)) for lesson in many]
    assert 0.4 < sum(count > 0 for count in counts) / len(counts) < 0.6
    one, two, three = (counts.count(n) for n in (1, 2, 3))
    assert one > two + three > three > 0


def test_the_seed_decides_for_each_item_whatever_the_others_are() -> None:
    def found(seed: int, count: int = 6) -> list[str]:
        return [shown(lesson) for lesson in lessons(person(*SUBJECTS[:count]), CHAT, fraction=0.5, seed=seed)]

    assert found(3) == found(3) != found(1)
    assert found(3, count=4) == found(3)[:4]


def test_memories_that_do_not_fit_are_skipped_for_the_next() -> None:
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
    trainer = RowTrainer(None, CharTokenizer(), CHAT, BuildOptions("chat", history_share=1.0), Recorder())
    examples = trainer.job("common", [ann, bob], steps=3, batch_size=4).examples
    texts = [CharTokenizer().decode(list(example.ids)) for example in examples]
    assert sorted(text.partition("<assistant>")[2][0] for text in texts) == sorted("01234501")
    assert sum(text.startswith("<user>And bread?") for text in texts) == 2  # nothing is before the first of each
    assert len(trainer.job("a00", [ann, bob], steps=1, batch_size=4).examples) == 4
    short = RowTrainer(None, CharTokenizer(), CHAT, BuildOptions("chat", max_tokens=20), Recorder())
    with pytest.raises(BankError, match="--max-tokens 20 leaves no room for answers"):
        short.job("common", [ann], steps=1, batch_size=1)
