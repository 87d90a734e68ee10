"""Text format: what is written is read back by protobuf as what was meant."""

from __future__ import annotations

import pytest
from fake_triton import SCHEMA, parse_config
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from mmedge.exports.pbtxt import Word, to_pbtxt


def test_scalars_lists_messages_and_maps() -> None:
    text = to_pbtxt(
        {
            "name": "a",
            "max_batch_size": 8,
            "input": [
                {"name": "x", "data_type": Word("TYPE_FP32"), "dims": [-1, 3], "optional": True},
                {"name": "y", "data_type": Word("TYPE_STRING"), "dims": [1]},
            ],
            "output": [],
            "dynamic_batching": {},
            "parameters": [{"key": "k", "value": {"string_value": "v"}}],
        }
    )
    config = parse_config(text)
    assert (config.name, config.max_batch_size) == ("a", 8)
    assert [list(tensor.dims) for tensor in config.input] == [[-1, 3], [1]]
    assert [tensor.optional for tensor in config.input] == [True, False]
    assert config.input[0].data_type == SCHEMA.TYPE_FP32
    assert config.HasField("dynamic_batching")
    assert config.parameters["k"].string_value == "v"


@given(st.text())
def test_any_string_survives(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    written = to_pbtxt({"name": text})
    assert len(written.splitlines()) == 1
    assert parse_config(written).name == text


def test_an_unknown_field_is_refused_by_the_schema() -> None:
    with pytest.raises(text_format.ParseError, match="max_batch"):
        parse_config(to_pbtxt({"max_batch": 8}))
