"""JSON of unknown origin: read within bounds, or refused by the given error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.errors import IntegrityError
from mmedge.files import json_file
from mmedge.files.json_file import parse_json, read_file, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
REFUSED = {
    "nothing": (b"", "not JSON"),
    "cut off": (b'{"a": [1, 2', "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
    "a key twice": (b'[{"a": 1, "b": 2, "a": 3}]', "the key 'a' appears twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "an infinity": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "a float out of range": (b'{"a": -1e999}', "-1e999 is beyond the range"),
    "a long integer": (b'{"a": ' + b"7" * 5000 + b"}", "a number of 5000 digits"),
    "a long fraction": (b'{"a": 0.' + b"7" * 5000 + b"}", "a number of 5002 digits"),
    "65 levels": (b"[" * 65 + b"]" * 65, "deeper than 64 levels"),
    "900 levels of objects": (b'{"a":' * 900 + b"1" + b"}" * 900, "deeper than 64 levels"),
    "100,000 levels": (b"[" * 100_000 + b"]" * 100_000, "deeper than 64 levels"),
    "100,000 levels, open": (b"[" * 100_000, "deeper than 64 levels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_only_plain_json_is_accepted(kind: str) -> None:
    data, reason = REFUSED[kind]
    with pytest.raises(IntegrityError, match=f"^here is .*{reason}"):
        parse_json(data, "here", error=IntegrityError)


def test_64_levels_are_read() -> None:
    document = parse_json(b"[" * 64 + b"]" * 64, "here", error=IntegrityError)
    assert json.dumps(document) == "[" * 64 + "]" * 64


def test_more_values_than_memory_should_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "_MAX_VALUES", 10)
    assert parse_json(b"[" + b"1," * 8 + b"1]", "here", error=IntegrityError) == [1] * 9
    for values in (b"[" + b"1," * 10 + b"1]", b"[" * 6 + b"]," * 5 + b"1]", b'{"a":[' * 6):
        with pytest.raises(IntegrityError, match="more than 10 JSON values"):
            parse_json(values, "here", error=IntegrityError)


@settings(max_examples=60)
@given(value=VALUES)
def test_json_is_read_back(value: object) -> None:
    data = json.dumps(value).encode()
    assert parse_json(data, "here", error=IntegrityError) == value


@settings(max_examples=300)
@given(value=VALUES, data=st.data())
def test_any_damage_is_read_or_refused(value: object, data: st.DataObject) -> None:
    content = bytearray(json.dumps({"a": [1.5e3, -2, value]}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"[" * 99, b"{", b'"', b"\\", b"\xff", b"1e9999", b"NaN", b"}"])
        )
    try:
        parse_json(bytes(content), "here", error=IntegrityError)
    except IntegrityError as error:  # and nothing else
        assert str(error).startswith("here ")  # noqa: PT017, either outcome is right


@pytest.mark.parametrize("name", ["missing", "nul\0", "n" * 5000, "folder", "pipe", "/dev/zero"])
def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match=r"Cannot read|is not a regular file"):
        read_json(tmp_path / name, max_bytes=100, error=IntegrityError)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b" " * 4094 + b"17")
    assert read_json(path, max_bytes=4096, error=IntegrityError) == 17
    with pytest.raises(IntegrityError, match=r"data\.json has 4096 bytes, expected at most 3 KiB"):
        read_file(path, max_bytes=4095, error=IntegrityError)
