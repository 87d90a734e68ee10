"""Chat templates: rendered as transformers does, within limits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mmedge.errors import BackendUnavailableError, InputError, TextError
from mmedge.preprocess.chat import ChatTemplate, flattened

CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0].content "
    "+ '<|im_end|>\n' }}{% endif %}\n"
    "{% for message in messages if message.role != 'system' %}\n"
    "    {% if loop.index > 100 %}{% break %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + "
    "'<|im_end|>' + '\n' }}\n"
    "{%- endfor %}\n"
    "{% macro show(x) %}{{ x | tojson }}{% endmacro %}{{ show(messages) }}{{ bos_token }}"
    "{% set ns = namespace(n=0) %}{% for _ in range(3) %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{% if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief. <b> & 'q' é"},
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "東京?"},
]


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    with ChatTemplate(CHATML, {"bos_token": "<s>"}) as made:
        yield made


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_the_prompt_is_that_of_transformers(
    template: ChatTemplate, answer: bool, first: int
) -> None:
    messages = MESSAGES[first:]
    (expected,), _ = render_jinja_template(
        [messages],
        chat_template=CHATML,
        add_generation_prompt=answer,
        bos_token="<s>",  # noqa: S106
    )
    assert template.render(messages, answer=answer) == expected


DOUBLING = (
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP, "CPU time"),
        (DOUBLING, "memory|CPU time"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "more than .* characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "memory|recursion"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|unsafe"),
        ("{{ messages.append(1) }}", "SecurityError|unsafe"),
        ("{% include '/etc/passwd' %}", "TypeError|loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at_all }}", "UndefinedError"),
    ],
)  # fmt: skip
def test_a_template_that_fails(source: str, message: str) -> None:
    with ChatTemplate(source, seconds=1) as template:
        for _ in range(2):  # the next call has a process again
            with pytest.raises(TextError, match=message):
                template.render(MESSAGES)


def test_a_process_that_was_ended_is_started_again(template: ChatTemplate) -> None:
    before = template.render(MESSAGES)
    assert template._child is not None
    template._child.kill()
    template._child.wait()
    assert template.render(MESSAGES) == before


def test_a_reply_that_was_not_read_is_not_that_of_the_next_chat(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = template.render(MESSAGES)
    assert template._child is not None
    with monkeypatch.context() as patch:

        def interrupted() -> str:
            raise KeyboardInterrupt

        patch.setattr(template._child.stdout, "readline", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            template.render(MESSAGES[3:])
        assert template._child is None
    assert template.render(MESSAGES) == expected


def test_an_error_is_cut_where_it_is_made() -> None:
    with (
        ChatTemplate("{{ raise_exception('x' * 9000000) }}") as template,
        pytest.raises(TextError) as raised,
    ):
        template.render(MESSAGES)
    assert 200 < len(str(raised.value)) < 600


def test_messages_that_json_cannot_hold(template: ChatTemplate) -> None:
    with pytest.raises(InputError, match="not JSON serializable"):
        template.render([{**MESSAGES[1], "tools": object()}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list"),
        ("hello", "expected a list"),
        ({"role": "user"}, "expected a list"),
        ([{"role": "robot", "content": "x"}], "Message 0: got role 'robot', expected one of"),
        ([*MESSAGES, {"content": "x"}], "Message 4: got role None"),
        ([{"role": "user", "content": ""}], "got content ''"),
        ([{"role": "user"}], "got content None"),
        (["x"], "got role None"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "a part 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0: got a part with text None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "got a part with text 5"),
        ([{"role": "user", "content": ["x"]}], "Message 0: got a part 'x'"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flattened(messages)


def test_parts_of_text_become_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert flattened([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


def test_sizes_are_bounded() -> None:
    with pytest.raises(TextError, match="Chat template: more than"):
        ChatTemplate("x" * (2 << 20))
    with (
        ChatTemplate("") as template,
        pytest.raises(TextError, match="Messages: more than"),
    ):
        template.render([{"role": "user", "content": "x" * (3 << 20)}])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmedge.preprocess.chat.find_spec", lambda _: None)
    assert importlib.util.find_spec("jinja2") is not None
    with pytest.raises(BackendUnavailableError, match=r"mmedge\[chat\]"):
        ChatTemplate("")
