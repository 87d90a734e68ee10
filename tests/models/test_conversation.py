"""A chat keeps its state from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmedge.errors import InputError
from mmedge.generation import GenerationOptions
from mmedge.generation.decoding import Decoding
from mmedge.models.conversation import Conversation
from mmedge.models.generator import Generator

OPTIONS = GenerationOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(gpt2_bundle: Path) -> Iterator[Generator]:
    with Generator.load(gpt2_bundle, precision="fp32") as loaded:
        yield loaded


@pytest.fixture
def run_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens in each call of the decoder."""
    seen: list[int] = []
    step = Decoding.step

    def counted(self: Decoding, ids: Any, mask: Any = None, *, last: int = 1) -> Any:
        seen.append(ids.shape[1])
        return step(self, ids, mask, last=last)

    monkeypatch.setattr(Decoding, "step", counted)
    return seen


def test_turns_equal_whole_chats_and_run_what_is_new(
    model: Generator, run_tokens: list[int]
) -> None:
    with Conversation(model, system="be kind", options=OPTIONS) as chat:
        first = chat.say("hi")
        messages = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": first.text},
        ]
        assert chat.messages == messages
        assert first == model.chat(messages[:2], options=OPTIONS)
        run_tokens.clear()
        second = chat.say("more")
        new = run_tokens[0]
        messages.append({"role": "user", "content": "more"})
        assert second == model.chat(messages, options=OPTIONS)
        assert new < len(model.chat_tokens(messages)) / 2
        chat.reset()
        assert chat.messages == messages[:1]
        assert chat.say("hi") == first


def test_what_was_said_before_the_reader_left_is_kept(model: Generator) -> None:
    with Conversation(model, options=OPTIONS) as chat:
        pieces = chat.stream("hi")
        first = next(pieces)
        pieces.close()
        assert chat.last is not None
        assert chat.last.finish == "cancelled"
        assert str(chat.messages[-1]["content"]).startswith(first)
        again = chat.say("on")
        assert again == model.chat(chat.messages[:-1], options=OPTIONS)


def test_a_turn_that_does_not_fit_is_taken_back(model: Generator) -> None:
    with Conversation(model, options=OPTIONS) as chat:
        first = chat.say("hi")
        before = list(chat.messages)
        with pytest.raises(InputError, match="Shorten the prompt"):
            chat.say("x" * 200)
        assert chat.messages == before
        assert chat.say("more").tokens == model.chat(chat.messages[:-1], options=OPTIONS).tokens
        assert first.tokens


def test_a_turn_that_is_interrupted_once_the_state_is_cut_is_taken_back(
    model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_given: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with Conversation(model, options=OPTIONS) as chat:
        first = chat.say("hi there")
        chat.reset()
        with monkeypatch.context() as patch:
            patch.setattr(model, "stream", interrupted)
            with pytest.raises(KeyboardInterrupt):
                chat.say("a")
        assert chat.say("hi there") == first


def test_a_turn_that_is_interrupted_before_it_begins_is_taken_back(
    model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_messages: object) -> list[int]:
        raise KeyboardInterrupt

    with Conversation(model, options=OPTIONS) as chat:
        with monkeypatch.context() as patch:
            patch.setattr(model, "chat_tokens", interrupted)
            with pytest.raises(KeyboardInterrupt):
                chat.say("hi")
        assert chat.messages == []
        assert chat.say("hi").tokens
