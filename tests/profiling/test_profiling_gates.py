"""Gates: what is a gate, what it names, and that none passes in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import ProfileError
from mmedge.profiling import Profile
from mmedge.profiling.gates import check_names, evaluate, parse_gate, runs_needed
from mmedge.profiling.metrics import CellKey, cell_names, expected_names, metrics


@pytest.mark.parametrize(
    ("text", "name", "op", "limit"),
    [
        ("image_encoder.p95_ms > 20", "image_encoder.p95_ms", ">", 20.0),
        ("image_encoder.p95_ms>20", "image_encoder.p95_ms", ">", 20.0),
        ("  a.int8-dynamic.b8.t2.p50_ms  <= 1e3 ", "a.int8-dynamic.b8.t2.p50_ms", "<=", 1000.0),
        ("a.cosine_mean < .995", "a.cosine_mean", "<", 0.995),
        ("a.x >= -2.5", "a.x", ">=", -2.5),
        ("a.x == 3.", "a.x", "==", 3.0),
    ],
)
def test_a_gate_is_read(text: str, name: str, op: str, limit: float) -> None:
    gate = parse_gate(text)
    assert (gate.name, gate.op, gate.limit) == (name, op, limit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "p95_ms > 20",
        "image_encoder.p95_ms",
        "image_encoder.p95_ms >",
        "image_encoder.p95_ms > twenty",
        "image_encoder.p95_ms > nan",
        "image_encoder.p95_ms > 1e999",
        "image_encoder.p95_ms = 20",
        "image_encoder.p95_ms != 20",
        "image_encoder.p95_ms => 20",
        "image_encoder.p95_ms > 20 or 1",
        "20 < image_encoder.p95_ms",
        "image_encoder..p95_ms > 20",
        "image_encoder.p95_ms > 20; import os",
        "__import__('os').system('true') > 0",
        "image_encoder.p95_ms > ٣",
    ],
)
def test_anything_else_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(ProfileError, match="expected NAME OP NUMBER") as caught:
        parse_gate(text)
    assert repr(text) in str(caught.value)


@given(st.text())
def test_no_text_does_more_than_be_read_or_refused(text: str) -> None:
    try:
        gate = parse_gate(text)
    except ProfileError:
        return
    assert gate.name in text


def results(profile: Profile, *gates: str) -> dict[str, tuple[float, bool]]:
    found = evaluate([parse_gate(gate) for gate in gates], metrics(profile))
    return {result.metric: (result.got, result.failed) for result in found}


def test_a_gate_without_a_variant_holds_every_variant(sample_profile: Profile) -> None:
    found = results(sample_profile, "image_encoder.p95_ms > 60")
    assert {name: failed for name, (_, failed) in found.items()} == {
        "image_encoder.fp32.b1.t2.p95_ms": True,
        "image_encoder.int8-dynamic.b1.t2.p95_ms": False,
        "image_encoder.int8-static.b1.t2.p95_ms": False,
    }


def test_batch_threads_and_length_are_the_first_unless_given(sample_profile: Profile) -> None:
    cells = {str(CellKey.of(cell)): cell for cell in sample_profile.cells}
    for name, full in (
        ("text_encoder.fp32.p50_ms", "text_encoder.fp32.b1.t2.s9"),
        ("text_encoder.fp32.s77.p50_ms", "text_encoder.fp32.b1.t2.s77"),
        ("text_encoder.fp32.b8.p50_ms", "text_encoder.fp32.b8.t2.s9"),
        ("text_encoder.fp32.b8.t2.s77.p50_ms", "text_encoder.fp32.b8.t2.s77"),
    ):
        ((metric, (got, failed)),) = results(sample_profile, f"{name} < 0").items()
        assert metric == f"{full}.p50_ms"
        assert got == cells[full].latency.percentiles["p50"].value_ms
        assert not failed


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        ("image_encoder.fp32.size_mb > 351.3", False),
        ("image_encoder.fp32.size_mb >= 351.2", True),
        ("image_encoder.fp32.size_mb == 351.2", True),
        ("image_encoder.fp32.size_mb < 351.2", False),
        ("image_encoder.fp32.size_mb <= 351.2", True),
        ("image_encoder.int8-dynamic.cosine_mean < 0.999", True),
        ("image_encoder.fp32.peak_memory_mb > 1000", False),
        ("image_encoder.fp32.cold_start_ms > 100", True),
        ("image_encoder.fp32.load_ms > 100", True),
        ("image_encoder.fp32.throughput_per_s < 5", False),
        ("image_encoder.int8-dynamic.ratio > 0.9", False),
        ("image_encoder.fp32.end_to_end.decode_ms > 2", True),
        ("image_encoder.fp32.end_to_end.p50_ms > 1000", False),
    ],
)
def test_every_kind_of_figure_can_be_gated(
    sample_profile: Profile, gate: str, *, failed: bool
) -> None:
    ((_, (_, got)),) = results(sample_profile, gate).items()
    assert got is failed


def test_a_missing_figure_is_an_error_that_lists_the_others(
    sample_profile: Profile,
) -> None:
    with pytest.raises(ProfileError, match=r"no figure 'image_encoder\.p96_ms'") as caught:
        results(sample_profile, "image_encoder.p96_ms > 20")
    assert "Did you mean" in str(caught.value)
    assert "image_encoder.peak_memory_mb" in str(caught.value)
    assert "image_encoder.end_to_end.decode_ms" in str(caught.value)


def test_a_percentile_that_the_sample_does_not_support_is_an_error(
    sample_profile: Profile,
) -> None:
    with pytest.raises(ProfileError, match="p99 needs 500 runs, this sample has 140"):
        results(sample_profile, "image_encoder.p99_ms > 1e9")


def test_the_names_that_are_promised_are_the_names_that_come(sample_profile: Profile) -> None:
    pairs = {(item.role, item.variant) for item in sample_profile.variants}
    promised = expected_names(
        [CellKey.of(cell) for cell in sample_profile.cells],
        cold_starts=True,
        staged={(s.role, s.variant): tuple(s.stages_ms) for s in sample_profile.stages},
        compared=[pair for pair in pairs if pair[1] != "fp32"],
        judged=pairs,
    )
    assert promised == {alias for figure in metrics(sample_profile) for alias in figure.aliases}


def test_a_name_is_checked_before_anything_is_measured() -> None:
    names = expected_names(
        [CellKey("image_encoder", "fp32", 1, 2)],
        cold_starts=False,
        staged={},
        compared=(),
        judged=(),
    )
    check_names([parse_gate("image_encoder.fp32.p99_ms > 1")], names)
    for gate in ("ratio", "cold_start_ms", "cosine_mean", "end_to_end.decode_ms"):
        with pytest.raises(ProfileError, match="no figure"):
            check_names([parse_gate(f"image_encoder.{gate} > 1")], names)


def test_a_gate_on_a_percentile_asks_for_the_runs_that_support_it() -> None:
    key = CellKey("image_encoder", "fp32", 1, 2)
    names = cell_names(key, key)
    gates = [parse_gate(f"image_encoder.{name} > 1") for name in ("mean_ms", "p95_ms", "p90_ms")]
    assert runs_needed(gates, names) == 100
    assert runs_needed(gates[:1], names) == 1
    assert runs_needed(gates, cell_names(CellKey("image_encoder", "fp32", 8, 2), key)) == 1
