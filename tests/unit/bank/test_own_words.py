"""Which words of a text are its writer's own."""

from __future__ import annotations

import time

import pytest

from bank.items.own_words import own_words

SAID = "honestly the sea was flat all week"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SAID, SAID),
        (
            "昨日は海がとても静かで、一日中ずっと波を待っていました。",
            "昨日は海がとても静かで、一日中ずっと波を待っていました。",
        ),
        ("ok thanks", ""),
        ("???  !!!  42 " * 20, ""),
        (f"> {SAID}\n> and more of it\nyes", ""),
        (f"> what she wrote to me\n{SAID}", SAID),
        (f"{SAID}\n```python\nimport os\nprint(os.name)\n```", SAID),
        (f"{SAID} ```never closed {SAID}", SAID),
        ("def waves(height):\n    total = height * 2;\n    return total\n", ""),
        ("for (int i = 0; i < n; i++) {\n  sum += values[i];\n}", ""),
        (
            "I told her (again) that the harbour; well, you know.",
            "I told her (again) that the harbour; well, you know.",
        ),
        (f"### Task:\nAnswer from the context.\n<context>\n<source id='1'>Tides\n</context>\n\n{SAID}", ""),
        (f"### Task:\nWrite a title.\n<chat_history>\nUSER: {SAID}\n</chat_history>", ""),
        (f"{SAID}\nCode runs in `<code_interpreter type='code'></code_interpreter>`: use it.", ""),
        (f"{SAID} <3 and a > b <br> but c < d", f"{SAID} <3 and a > b <br> but c < d"),
        (f"> <b>quoted</b>\n{SAID}", SAID),
    ],
)
def test_only_a_persons_own_words_are_kept(text: str, words: str) -> None:
    assert own_words(text) == words


def test_a_long_text_is_read_in_no_time() -> None:
    for text in ("<a-" * 300_000, "<" + "a" * 900_000, "<a " * 300_000):
        started_s = time.process_time()
        own_words(text)
        assert time.process_time() - started_s < 5
