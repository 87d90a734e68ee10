"""A profile with the figures of a real one, for what reads profiles."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.profiling import Profile, ProfileConfig
from mmedge.profiling.config import Budget
from mmedge.profiling.result import (
    BaselineFigures,
    BundleFacts,
    Cell,
    ColdStart,
    Machine,
    Memory,
    PlacementFacts,
    Spread,
    StageBreakdown,
    VariantFigures,
)
from mmedge.profiling.statistics import median_ratio, summarize

ROLES = {"image_encoder": (None,), "text_encoder": (9, 77)}
FULL_MS = {"image_encoder": 104.0, "text_encoder": 68.0}
SPEED = {"fp32": 1.0, "int8-dynamic": 0.34, "int8-static": 0.38}
SIZE = {"fp32": 4.0, "int8-dynamic": 1.02, "int8-static": 1.04}
COSINE = {"fp32": 1.0, "int8-dynamic": 0.9981, "int8-static": 0.9962}


def draw_ns(mean_ms: float, runs: int, seed: int) -> list[int]:
    """Latencies with a tail, as real ones have."""
    random = np.random.default_rng(seed)
    return [int(x) for x in mean_ms * 1e6 * (1 + random.gamma(0.7, 0.04, runs))]


def make_cell(
    role: str, variant: str, *, batch: int = 1, sequence: int | None = None, runs: int = 140
) -> Cell:
    mean_ms = FULL_MS[role] * SPEED[variant] * (0.93 * batch + 0.07) * (sequence or 77) / 77
    seed = len(role) + len(variant) * 7 + batch
    ours = draw_ns(mean_ms, runs, seed)
    latency = summarize(ours, [int(1.8 * x) for x in ours])
    baseline = None
    if variant != "fp32":
        theirs = draw_ns(mean_ms / SPEED[variant], runs, seed + 1)
        baseline = BaselineFigures(
            name="fp32",
            latency=summarize(theirs, [int(1.8 * x) for x in theirs]),
            ratio=median_ratio(ours, theirs),
        )
    return Cell(
        role=role,
        variant=variant,
        batch=batch,
        threads=2,
        sequence=sequence,
        latency=latency,
        throughput_per_s=batch * 1e3 / latency.mean_ms,
        placement=PlacementFacts(
            backend="onnxruntime",
            device="cpu",
            engine="onnxruntime 1.32.0",
            providers={"CPUExecutionProvider": 214},
            exceptions={},
        ),
        baseline=baseline,
        noise=("12% of the CPU time was used",) if variant == "int8-static" else (),
    )


def make_variant(role: str, variant: str) -> VariantFigures:
    size = int(SIZE[variant] * (87.8e6 if role == "image_encoder" else 63.4e6))
    load = 60 + size / 1e6
    return VariantFigures(
        role=role,
        variant=variant,
        precision=variant.partition("-")[0],
        size_bytes=size,
        cosine_mean=COSINE[variant],
        cosine_p1=2 * COSINE[variant] - 1,
        cold_start=ColdStart(
            runs=3,
            first_embedding_ms=Spread(median=load + 340, low=load + 320, high=load + 400),
            load_ms=Spread(median=load, low=load - 9, high=load + 14),
            import_ms=Spread(median=180.0, low=170.0, high=195.0),
            first_run_ms=Spread(median=120.0, low=110.0, high=140.0),
            cpu_ms=Spread(median=load + 290, low=load + 280, high=load + 300),
        ),
        memory=Memory(
            before_load_bytes=49_000_000,
            peak_bytes=92_000_000 + int(1.3 * size),
            steady_bytes=90_000_000 + size,
            anonymous_bytes=40_000_000 + size,
            source="/proc/self/status",
        ),
    )


def make_stages(role: str, variant: str) -> StageBreakdown:
    inference = FULL_MS[role] * SPEED[variant]
    if role == "image_encoder":
        stages = {"decode": 2.9, "resize": 4.1, "normalize": 0.3, "inference": inference}
    else:
        stages = {"tokenize": 0.08, "inference": inference * 14 / 77}
    total = sum(stages.values())
    whole = draw_ns(total + 0.4, 40, 5)
    latency = summarize(whole, whole)
    return StageBreakdown(
        role=role,
        variant=variant,
        threads=2,
        input="1280x720 JPEG of 186 kB" if role == "image_encoder" else "14 tokens",
        stages_ms={**stages, "other": latency.percentiles["p50"].value_ms - total},
        sum_ms=total,
        end_to_end=latency,
    )


@pytest.fixture
def sample_profile() -> Profile:
    """Two roles, three variants, batch 1 and 8, a baseline, stages; figures like ViT-B/32's."""
    pairs = [(role, variant) for role in ROLES for variant in SPEED]
    return Profile(
        created="2026-01-01T12:00:00+00:00",
        bundle=BundleFacts(
            name="clip-vit-base-patch32",
            path="clip.mmedge",
            family="clip",
            source="openai/clip-vit-base-patch32",
            created="2026-01-01T00:00:00+00:00",
        ),
        machine=Machine(
            cpu_model="Example CPU @ 2.60GHz",
            processors_online=4,
            processors_allowed=(0, 1),
            governor="performance",
            frequency_mhz=2600.0,
            load_average_before=(0.1, 0.2, 0.3),
            load_average_after=(1.9, 1.0, 0.5),
            memory_total_bytes=8_000_000_000,
            platform="Linux-6.1-x86_64",
            versions={"python": "3.11.7", "onnxruntime": "1.32.0"},
            harness_overhead_ns=80.0,
        ),
        config=ProfileConfig(batches=(1, 8), threads=(2,), budget=Budget(min_runs=140)),
        cells=tuple(
            make_cell(role, variant, batch=batch, sequence=sequence)
            for role, variant in pairs
            for batch in (1, 8)
            for sequence in ROLES[role]
        ),
        variants=tuple(make_variant(*pair) for pair in pairs),
        stages=tuple(make_stages(*pair) for pair in pairs),
        warnings=("The machine was busy at the start: load 1.90 on 2 processors.",),
    )
