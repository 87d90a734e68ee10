"""The feed check: what passes, what is refused, and with which words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.specs import (
    Array,
    Axis,
    TensorSpec,
    as_dim,
    check_feed,
    did_you_mean,
    dim_size,
    first_sample,
    shape_of,
)

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = TensorSpec("pixel_values", FLOAT, ("batch", 3, 4, 4))
IDS = TensorSpec("input_ids", INT, ("batch", "sequence"))
MASK = TensorSpec("attention_mask", INT, ("batch", "sequence"))


def _ids(*shape: int) -> Array:
    return np.zeros(shape, INT)


def test_a_spec_prints_as_a_person_writes_it() -> None:
    assert str(IMAGE) == "pixel_values float32(batch, 3, 4, 4)"
    assert str(TensorSpec("scale", FLOAT, ())) == "scale float32()"


def test_axes_that_no_axis_names_are_not_returned() -> None:
    assert check_feed((IMAGE,), {"pixel_values": np.zeros((2, 3, 4, 4), FLOAT)}) == {"batch": 2}
    assert check_feed((), {}) == {}
    assert check_feed((TensorSpec("s", FLOAT, ()),), {"s": np.zeros((), FLOAT)}) == {}


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_size_of_a_dynamic_axis_passes_and_is_returned(batch: int, sequence: int) -> None:
    feed = {"attention_mask": _ids(batch, sequence), "input_ids": _ids(batch, sequence)}

    assert check_feed((IDS, MASK), feed) == {"batch": batch, "sequence": sequence}


@given(st.tuples(*[st.integers(0, 3)] * 4))
def test_two_inputs_must_agree(shape: tuple[int, int, int, int]) -> None:
    one, other = shape[:2], shape[2:]
    feed = {"input_ids": _ids(*one), "attention_mask": _ids(*other)}
    if one == other and 0 not in one:
        assert check_feed((IDS, MASK), feed) == {"batch": one[0], "sequence": one[1]}
    else:
        with pytest.raises(ShapeError, match=r"must not be empty|elsewhere"):
            check_feed((IDS, MASK), feed)


@pytest.mark.parametrize(
    ("feed", "kind", "message"),
    [
        ({}, InputError, r"got \[\], expected \['input_ids'\]"),
        ({"ids": _ids(1, 2)}, InputError, r"got \['ids'\], expected \['input_ids'\]"),
        ({"input_ids": _ids(1, 2), "more": _ids(1)}, InputError, r"got \['input_ids', 'more'\]"),
        ({"input_ids": [[1, 2]]}, InputError, r"'input_ids': got list.*numpy\.asarray"),
        (
            {"input_ids": np.zeros((1, 2), np.int32)},
            DTypeError,
            r"'input_ids': got dtype int32, expected int64.*astype\('int64'\)",
        ),
        ({"input_ids": _ids(2)}, ShapeError, r"got \(2,\), expected \('batch', 'sequence'\)"),
        ({"input_ids": _ids(1, 2, 1)}, ShapeError, r"got \(1, 2, 1\).*number of axes"),
        ({"input_ids": _ids(0, 2)}, ShapeError, r"'batch' must not be empty"),
        ({"input_ids": _ids(1, 0)}, ShapeError, r"'sequence' must not be empty"),
    ],
)
def test_a_wrong_feed_names_got_and_expected(
    feed: dict[str, Array], kind: type[InputError], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_feed((IDS,), feed)
    assert type(caught.value) is kind


def test_a_wrong_image_size_points_to_the_preprocessing() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 3, 5, 4\), expected \('batch', 3, 4, 4\).*mmedge"):
        check_feed((IMAGE,), {"pixel_values": np.zeros((1, 3, 5, 4), FLOAT)})


def test_a_feed_of_the_other_byte_order_is_refused() -> None:
    with pytest.raises(DTypeError):
        check_feed((IDS,), {"input_ids": _ids(1, 2).astype(">i8")})


PAST = TensorSpec("past.0.key", FLOAT, ("batch", 2, "past", 4))
TOTAL = TensorSpec("total_mask", INT, ("batch", "past + sequence"))


@pytest.mark.parametrize("past", [0, 3])
def test_an_axis_may_be_empty_where_its_min_is_0(past: int) -> None:
    feed = {"past.0.key": np.zeros((1, 2, past, 4), FLOAT), "input_ids": _ids(1, 2)}
    axes = {"past": Axis(0, 8, 16), "batch": Axis(1, 1, 4)}

    sizes = check_feed((PAST, IDS), feed, axes)

    assert sizes == {"batch": 1, "past": past, "sequence": 2}
    for bounds in (None, {}, {"past": Axis(1, 8, 16)}):
        if past == 0:
            with pytest.raises(ShapeError, match=r"'past' must not be empty, unless .* min 0"):
                check_feed((PAST, IDS), feed, bounds)
    with pytest.raises(ShapeError, match="'sequence' must not be empty"):
        check_feed((IDS,), {"input_ids": _ids(1, 0)}, axes)


@given(past=st.integers(1, 5), sequence=st.integers(1, 5), total=st.integers(1, 10))
def test_a_sum_in_an_input_must_be_that_sum(past: int, sequence: int, total: int) -> None:
    arrays = {"past.0.key": np.zeros((1, 2, past, 4), FLOAT), "input_ids": _ids(1, sequence)}
    feed = {"total_mask": _ids(1, total)} | arrays
    if total == past + sequence:
        assert check_feed((TOTAL, PAST, IDS), feed)["past + sequence"] == total
    else:
        with pytest.raises(ShapeError, match=f"'past \\+ sequence' is {past + sequence} elsewhere"):
            check_feed((TOTAL, PAST, IDS), feed)


def test_a_sum_of_names_that_nothing_else_has_is_a_name() -> None:
    assert check_feed((TOTAL,), {"total_mask": _ids(2, 7)}) == {"batch": 2, "past + sequence": 7}


@pytest.mark.parametrize(
    ("text", "dim", "size"),
    [
        ("batch", "batch", 2),
        (" batch ", "batch", 2),
        ("past+sequence", "past + sequence", 8),
        ("past +  sequence + 1", "past + sequence + 1", 9),
        ("sequence + past", "past + sequence", 8),
        ("1 + past + 2", "past + 3", 8),
        ("past + 0", "past", 5),
        ("12", 12, 12),
        ("1 + 2", 3, 3),
        ("unk__7", "unk__7", None),
        ("past + unk__7", "past + unk__7", None),
        ("2*past + (batch - 1)", "2*past + (batch - 1)", None),
        ("past + ", "past +", None),
        ("x*(z + b)", "x*(z + b)", None),
        ("größe", "größe", None),
    ],
)
def test_a_graphs_spelling_of_a_size_is_read_and_evaluated(
    text: str, dim: int | str, size: int | None
) -> None:
    sizes = {"batch": 2, "past": 5, "sequence": 3}
    assert as_dim(text) == dim
    assert dim_size(as_dim(text), sizes) == size
    spec = TensorSpec("y", FLOAT, ("batch", text, 4))
    assert spec.shape == ("batch", dim, 4)
    shape = shape_of(spec, sizes)
    assert shape == (None if size is None else (2, size, 4))


@pytest.mark.parametrize("bounds", [(-1, 1, 2), (2, 1, 2), (1, 3, 2), (0, 0, 0)])
def test_bounds_out_of_order_are_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="expected 0 <= min <= opt <= max and 1 <= max"):
        Axis(*bounds)


def test_a_misspelt_name_is_put_right() -> None:
    assert did_you_mean("itn8", ["fp32", "int8"]) == " Did you mean int8?"
    assert did_you_mean("zebra", ["fp32", "int8"]) == ""


def test_a_first_sample_leaves_a_fixed_batch_whole() -> None:
    fixed, scale = TensorSpec("fixed", FLOAT, (3, 2)), TensorSpec("scale", FLOAT, ())
    feed = {"input_ids": _ids(4, 5), "fixed": np.ones((3, 2), FLOAT), "scale": np.ones((), FLOAT)}
    shapes = {n: a.shape for n, a in first_sample((IDS, fixed, scale), feed).items()}
    assert shapes == {"input_ids": (1, 5), "fixed": (3, 2), "scale": ()}
