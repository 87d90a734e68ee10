"""Chat templates: messages to a prompt, rendered in a child process with limits.

A template is code of the model's author. Jinja2's sandbox keeps it from attributes and modules, and
a child process of limited CPU time and memory from loops without end.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from mmedge.children import child_command, child_environment
from mmedge.closing import Closing
from mmedge.errors import BackendUnavailableError, InputError, TextError

__all__ = ["ROLES", "ChatTemplate", "Message", "check_messages", "flattened"]

ROLES = ("system", "user", "assistant", "tool")
Message: TypeAlias = Mapping[str, object]
"""`role`, one of ROLES, and `content`, a text or a list of parts such as {"type": "text", ...}."""

_SECONDS = 2.0  # of CPU time
_MAX_BYTES = 1 << 20  # of template and of messages


class ChatTemplate(Closing):
    """A Jinja2 template of a chat. Thread-safe; its child process starts with the first chat.

    Args:
        source: The template.
        tokens: Special tokens by name: bos_token, eos_token, ...
        seconds: CPU time that one rendering may take.

    Raises:
        TextError: If the template is too large.
        BackendUnavailableError: If Jinja2 is not installed.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, *, seconds: float = _SECONDS
    ) -> None:
        if len(source.encode()) > _MAX_BYTES:
            raise TextError(f"Chat template: more than {_MAX_BYTES} bytes. Use a shorter one.")
        if find_spec("jinja2") is None:
            raise BackendUnavailableError(
                "Chats take the package jinja2, which is not installed. Install mmedge[chat]."
            )
        self._source = source
        self._tokens = dict(tokens or {})
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Return the prompt of a chat.

        Args:
            messages: At least one.
            answer: Whether the prompt ends where the assistant begins to speak.

        Raises:
            InputError: If a message has an unknown role or no content, or JSON cannot hold it.
            TextError: If the template refuses them, fails, or takes too long or too much memory.
        """
        check_messages(messages)
        given = {**self._tokens, "messages": list(messages), "add_generation_prompt": answer}
        request = {"template": self._source, "given": given, "seconds": self._seconds}
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"messages: {error}. Pass what JSON can hold.") from error
        if len(line) > 2 * _MAX_BYTES:
            raise TextError(f"Messages: more than {_MAX_BYTES} bytes. Send fewer or shorter ones.")
        with self._lock:
            reply = self._ask(line)
        found = json.loads(reply) if reply else {}
        if "text" in found:
            return str(found["text"])
        reason = found.get("error") or (
            f"it took more than {self._seconds:g} s of CPU time, or the process ended"
        )
        raise TextError(
            f"The model's chat template failed ({reason}). Change the messages, or use "
            "complete with a prompt of your own."
        )

    def _ask(self, line: str) -> str:
        """Send a request to the child; return its reply, empty if it ended before the reply did.

        No child is left with a reply that was not read: the next request would get it.
        """
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._child is None:
            self._child = subprocess.Popen(  # noqa: S603, a file of mmedge
                child_command(Path(__file__).with_name("chat_child.py")),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=child_environment(),
            )
        child = self._child
        assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018, pipes
        reply = ""
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            whole = reply.endswith("\n")
            if not whole:
                self._end()
        return reply if whole else ""

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # what was not sent yet
                        pipe.close()

    def close(self) -> None:
        """End the child process. A later rendering starts another."""
        with self._lock:
            self._end()


def check_messages(messages: Sequence[Message]) -> None:
    """Check the form of messages.

    Raises:
        InputError: If there are none, or one has an unknown role or no content.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError(
            f"messages: got {messages!r}, expected a list such as "
            "[{'role': 'user', 'content': 'Hello'}]."
        )
    for at, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise InputError(f"Message {at}: got role {role!r}, expected one of {ROLES}.")
        content = message.get("content")
        if not isinstance(content, str | list) or not content:
            raise InputError(
                f"Message {at}: got content {content!r}, expected a text or a list of parts."
            )


def flattened(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose parts of text are one text, for a model of texts.

    Raises:
        InputError: If a message is malformed, or holds anything but text.
    """
    check_messages(messages)
    made: list[Message] = []
    for at, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list):
            content = "".join(_part_text(part, at) for part in content)
        made.append({**message, "content": content})
    return made


def _part_text(part: object, at: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind != "text":
        raise InputError(f"Message {at}: got a part {kind!r}; this model takes texts.")
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise InputError(
            f"Message {at}: got a part with text {text!r}, expected "
            "{'type': 'text', 'text': 'Hello'}."
        )
    return text
