"""Searches as they come out, for the tests of what shows them."""

from __future__ import annotations

from mmedge.bundle.quality import Figure
from mmedge.bundle.tuning import Candidate, SearchRecord, Speed, Verdict

__all__ = ["candidate", "large_search", "nothing_gained", "small_search"]

MB = 1_000_000


def figure(value: float, low: float | None = None, high: float | None = None) -> Figure:
    """A figure, without width where no ends are given."""
    return Figure(value=value, low=value if low is None else low, high=high or value)


def candidate(
    variant: str,
    verdict: Verdict = "dropped",
    reason: str = "int8-dynamic is faster and loses no more",
    *,
    drop: Figure | None = None,
    size_mb: float | None = None,
    ms: float | None = None,
    ratio: float | None = None,
    backend: str = "onnxruntime",
    energy_mj: float | None = None,
) -> Candidate:
    """A candidate; what is not given was not measured."""
    speed = None
    if ms is not None:
        known = ms / 104.0 if ratio is None else ratio
        speed = Speed(
            backend=backend,
            latency_ms=ms,
            ratio=figure(known, known * 0.97, known * 1.04),
            energy_mj=energy_mj,
        )
    return Candidate(
        variant=variant,
        drop=drop,
        cosine_mean=None if drop is None else 1 - abs(drop.value) / 10,
        size_bytes=None if size_mb is None else round(size_mb * MB),
        speed=speed,
        verdict=verdict,
        reason=reason,
        duration_s=0.0 if ms is None else 12.5,
    )


def search(*candidates: Candidate, **fields: object) -> SearchRecord:
    """A search of them."""
    known: dict[str, object] = {
        "metric": "recall@1",
        "max_drop": 0.01,
        "objective": "latency",
        "processor": "Example CPU @ 2.60GHz",
        "threads": 2,
        "data": "test: 300 images",
        "samples": 300,
        "candidates": candidates,
    }
    return SearchRecord.model_validate(known | fields)


def small_search() -> SearchRecord:
    """Three candidates: fp32, one that is chosen, one that could not be made."""
    return search(
        candidate("fp32", "front", "the reference", drop=figure(0.0), size_mb=352, ms=104),
        candidate(
            "int8-dynamic",
            "chosen",
            "within the budget, 0.31 of fp32's time, 0.25 of its size",
            drop=figure(0.002, -0.004, 0.009),
            size_mb=89,
            ms=32.2,
            backend="openvino",
        ),
        candidate("float8", reason="no backend here runs it"),
        joint_drop=figure(0.004, -0.003, 0.011),
    )


def nothing_gained() -> SearchRecord:
    """fp32 is all that is left."""
    return search(
        candidate(
            "fp32",
            "chosen",
            "no candidate within the budget is faster or smaller",
            drop=figure(0.0),
            size_mb=352,
            ms=104,
        ),
        candidate(
            "int8-dynamic",
            reason="loses 0.2130 of recall@1, more than 0.01",
            drop=figure(0.213, 0.17, 0.25),
            size_mb=89,
            ms=32,
        ),
    )


def large_search(**fields: object) -> SearchRecord:
    """Fifteen candidates: equal points, gains, wide intervals, losses far beyond the budget."""
    over = "loses {:.4f} of recall@1, more than 0.01"
    slower = "no gain: 1.05 of fp32's time, 0.98 of its size"
    near = "within the budget, nearer to fp32 than int8-static-mse-equalized-corrected-keep8"
    return search(
        candidate("fp32", "front", "the reference", drop=figure(0), size_mb=352, ms=104),
        candidate(
            "float16",
            "front",
            near,
            drop=figure(0.0, -0.001, 0.001),
            size_mb=176,
            ms=109,
            backend="openvino",
        ),
        candidate("bfloat16", reason="no backend here runs it faster than fp32"),
        candidate(
            "int8-dynamic",
            reason=over.format(0.0117),
            drop=figure(0.0117, 0.002, 0.021),
            size_mb=89.4,
            ms=35.2,
        ),
        candidate(
            "int8-dynamic-equalized",
            drop=figure(0.0083, -0.001, 0.018),
            size_mb=89.4,
            ms=35.3,
        ),
        candidate(
            "int8-static-minmax",
            reason=over.format(0.8067),
            drop=figure(0.8067, 0.76, 0.84),
            size_mb=89.1,
            ms=31.0,
            backend="openvino",
        ),
        candidate(
            "int8-static-percentile",
            reason=over.format(0.1533),
            drop=figure(0.1533, 0.11, 0.2),
            size_mb=89.1,
            ms=31.1,
            backend="openvino",
        ),
        candidate(
            "int8-static-entropy",
            reason=over.format(0.0567),
            drop=figure(0.0567, 0.028, 0.087),
            size_mb=89.1,
            ms=30.9,
            backend="openvino",
        ),
        candidate(
            "int8-static-mse",
            reason=over.format(0.0267),
            drop=figure(0.0267, 0.008, 0.047),
            size_mb=89.1,
            ms=31.0,
            backend="openvino",
        ),
        candidate(
            "int8-static-mse-equalized",
            drop=figure(0.005, -0.009, 0.018),
            size_mb=89.1,
            ms=31.3,
            backend="openvino",
        ),
        candidate(
            "int8-static-mse-equalized-corrected",
            drop=figure(0.005, -0.009, 0.018),
            size_mb=89.1,
            ms=31.3,
            backend="openvino",
        ),
        candidate(
            "int8-static-mse-equalized-corrected-keep8",
            "chosen",
            "within the budget, 0.32 of fp32's time, 0.30 of its size",
            drop=figure(-0.0017, -0.011, 0.008),
            size_mb=104,
            ms=33.4,
            backend="openvino",
        ),
        candidate(
            "int8-weights-group32",
            "front",
            near,
            drop=figure(0.0, -0.002, 0.002),
            size_mb=101,
            ms=101,
        ),
        candidate(
            "int4-weights-group32-rtn",
            reason=over.format(0.0933),
            drop=figure(0.0933, 0.055, 0.13),
            size_mb=57,
            ms=107,
        ),
        candidate(
            "int4-weights-group32-gptq",
            reason=slower,
            drop=figure(0.0167, 0.0, 0.035),
            size_mb=57,
            ms=107,
        ),
        joint_drop=figure(0.0, -0.012, 0.012),
        **fields,
    )
