"""`mmedge chat`, and `mmedge run` of a generator, print texts as they come."""

from __future__ import annotations

import io
from pathlib import Path

import commands
import pytest

from mmedge.cli.output import plain
from mmedge.generation import GenerationOptions
from mmedge.models.conversation import Conversation
from mmedge.models.generator import Generator

SHORT = ("--max-new-tokens", "6", "--precision", "fp32")


def shown(text: str) -> str:
    return "\t".join(map(plain, text.split("\t")))


@pytest.fixture(scope="module")
def replies(gpt2_bundle: Path) -> list[str]:
    """What the model says to "hi", and then to "more"."""
    options = GenerationOptions(max_new_tokens=6)
    with (
        Generator.load(gpt2_bundle, precision="fp32") as model,
        Conversation(model, options=options) as chat,
    ):
        return [shown(chat.say(text).text) for text in ("hi", "more")]


def test_lines_are_answered(
    gpt2_bundle: Path,
    replies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = "/help\nhi\n\nmore\n/reset\nhi\n/exit\nhi\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    out = commands.run(capsys, "chat", gpt2_bundle, *SHORT)
    assert out.startswith("/help ")
    assert out.endswith("".join(f"{text}\n" for text in (*replies, replies[0])))


def test_the_end_of_the_input_ends_it(
    gpt2_bundle: Path,
    replies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/nope\nhi"))
    out = commands.run(capsys, "chat", gpt2_bundle, *SHORT)
    assert out == replies[0] + "\n"


def test_a_message_that_is_too_long_is_an_error(
    gpt2_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300))
    err = commands.run(capsys, "chat", gpt2_bundle, *SHORT, code=1)
    assert "Shorten the prompt" in err


def test_input_of_another_encoding_is_an_error(
    gpt2_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    err = commands.run(capsys, "chat", gpt2_bundle, *SHORT, code=1)
    assert "Input: not utf-8 at byte 0" in err


def test_an_input_that_is_closed_is_an_error(
    gpt2_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    err = commands.run(capsys, "chat", gpt2_bundle, *SHORT, code=1)
    assert "Input: it is closed" in err


def test_another_kind_of_bundle_has_no_chat(
    clap_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "generator" in commands.run(capsys, "chat", clap_bundle, code=1).lower()


def test_a_text_is_printed_with_what_continues_it(
    gpt2_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = commands.run(capsys, "run", gpt2_bundle, "--text", "a red", "--text", "hello", *SHORT)
    with Generator.load(gpt2_bundle, precision="fp32") as model:
        texts = [
            text + shown(model.complete(text, max_new_tokens=6).text) for text in ("a red", "hello")
        ]
    assert out == "".join(f"{text}\n" for text in texts)
