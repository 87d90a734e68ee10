"""Writer of the protobuf text format for config.pbtxt, without protobuf.

Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Field", "Message", "Word", "to_pbtxt"]


@dataclass(frozen=True, slots=True)
class Word:
    """An enum value, written without quotes: TYPE_FP32."""

    text: str


Scalar: TypeAlias = str | int | float | bool | Word
Message: TypeAlias = "Mapping[str, Field]"
Field: TypeAlias = "Scalar | Message | Sequence[Scalar] | Sequence[Message]"
"""A scalar, a message, or several of one of these for a repeated field.

An entry of a map is a message with the fields key and value."""


def to_pbtxt(message: Message) -> str:
    """Return a message as text, one field per line, in the given order.

    Args:
        message: Field values by name. Empty sequences leave the field out.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            scalars = [entry for entry in value if not isinstance(entry, Mapping)]
            if scalars:
                yield f"{name}: [ {', '.join(map(_scalar, scalars))} ]"
            for entry in value:
                if isinstance(entry, Mapping):
                    yield from _block(name, entry)
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Message) -> Iterator[str]:
    inner = list(_lines(message))
    if not inner:
        yield f"{name} {{ }}"
        return
    yield f"{name} {{"
    for line in inner:
        yield f"  {line}"
    yield "}"


def _scalar(value: Scalar) -> str:
    if isinstance(value, Word):
        return value.text
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    return repr(value)


def _escaped(text: str) -> str:
    """Escape a string: control and non-ASCII bytes in octal."""
    plain = []
    for byte in text.encode("utf-8"):
        if byte in b'"\\':
            plain.append("\\" + chr(byte))
        elif 32 <= byte < 127:
            plain.append(chr(byte))
        else:
            plain.append(f"\\{byte:03o}")
    return "".join(plain)
