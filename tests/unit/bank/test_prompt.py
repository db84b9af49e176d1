"""Rendering: what training sees is what serving sees, and only the answer carries loss."""

from __future__ import annotations

import pytest

from bank.items.prompt import chat_messages, encode_pair


class CharTokenizer:
    """One id per character, under a chat template of its own."""

    def __init__(self, close: str = "<end>\n", eos_token: str | None = "</s>", strips: bool = False) -> None:
        self.close, self.eos_token, self.strips = close, eos_token, strips

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        text = "".join(
            f"<{m['role']}>{m['content'].strip() if self.strips else m['content']}{self.close}" for m in conversation
        )
        return text + ("<assistant>" if add_generation_prompt else "")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(i) for i in token_ids)


def split(tokenizer: CharTokenizer, turn: str, output: str, max_tokens: int = 1000) -> tuple[str, str]:
    pair = encode_pair(tokenizer, turn, output, max_tokens)
    assert len(pair.ids) <= max_tokens
    return tokenizer.decode(list(pair.ids[: pair.loss_from])), tokenizer.decode(list(pair.ids[pair.loss_from :]))


@pytest.mark.parametrize(
    ("tokenizer", "output", "rendered"),
    [
        (CharTokenizer(), "yo", ("<user>hi<end>\n<assistant>", "yo<end>")),
        (CharTokenizer(strips=True), " yo ", ("<user>hi<end>\n<assistant>", " yo <end>")),
        (CharTokenizer(close="\n"), "yo", ("<user>hi\n<assistant>", "yo</s>")),  # no end of turn: the end of text
        (CharTokenizer(close="", eos_token=None), "yo", ("<user>hi<assistant>", "yo")),
        *((CharTokenizer(), odd, ("<user>hi<end>\n<assistant>", f"{odd}<end>")) for odd in ("a<end>b", "<assistant>")),
    ],
)
def test_the_prompt_is_what_serving_renders_and_loss_falls_on_the_output_and_the_end_of_turn_alone(
    tokenizer: CharTokenizer, output: str, rendered: tuple[str, str]
) -> None:
    assert chat_messages("hi") == [{"role": "user", "content": "hi"}]
    served = tokenizer.apply_chat_template(chat_messages("hi"), tokenize=False, add_generation_prompt=True)
    assert split(tokenizer, "hi", output) == rendered
    assert rendered[0] == served


def test_a_long_turn_loses_its_end_and_never_the_template() -> None:
    prompt, output = split(CharTokenizer(), "x" * 100, "yo", max_tokens=60)
    assert prompt.startswith("<user>xxx")
    assert prompt.endswith("x<end>\n<assistant>")
    assert output == "yo<end>"
    assert len(prompt + output) == 60


@pytest.mark.parametrize("longest", range(52, 64))
def test_a_turn_that_is_cut_within_a_character_takes_nothing_from_the_output(longest: int) -> None:
    """Half a character is decoded as three bytes."""

    class Bytes(CharTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

        def decode(self, token_ids: list[int]) -> str:
            return bytes(token_ids).decode(errors="replace")

    _, output = split(Bytes(), "\N{SURFER}" * 20, "yo", longest)
    assert output == "yo<end>"


def test_an_output_that_is_too_long_by_itself_is_cut() -> None:
    prompt, output = split(CharTokenizer(), "x" * 100, "y" * 100, max_tokens=60)
    assert prompt == "<user><end>\n<assistant>"
    assert output == "y" * (60 - len(prompt))
