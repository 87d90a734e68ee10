"""Names of a profile's figures, for gates: `image_encoder.int8.b8.t2.p95_ms`.

A figure of a cell is named by role, variant, `b` batch, `t` threads, for text `s` sequence length,
and the metric. The variant may be left out, which means every variant that was measured. So may
batch, threads and sequence, which means the first of each that was requested. What holds whatever
the batch (cold start, memory, size, stages) is named by role, variant and metric alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mmedge.profiling.result import Cell, Latency, Profile, StageBreakdown, VariantFigures
from mmedge.profiling.statistics import PERCENTILES, required_samples

__all__ = ["CellKey", "Metric", "cell_names", "expected_names", "metrics", "stage_names"]

_LATENCY_METRICS = (
    *(f"p{percent}_ms" for percent in PERCENTILES),
    "mean_ms",
    "min_ms",
    "max_ms",
    "cpu_ms",
)
_CELL_METRICS = (*_LATENCY_METRICS, "throughput_per_s")
_COLD_METRICS = (
    "cold_start_ms",
    "cold_start_cpu_ms",
    "load_ms",
    "peak_memory_mb",
    "steady_memory_mb",
)
_QUALITY_METRICS = ("cosine_mean", "cosine_p1")


@dataclass(frozen=True, slots=True)
class CellKey:
    """Identity of a cell."""

    role: str
    variant: str
    batch: int
    threads: int
    sequence: int | None = None

    @classmethod
    def of(cls, cell: Cell) -> CellKey:
        """Return the key of a measured cell."""
        return cls(cell.role, cell.variant, cell.batch, cell.threads, cell.sequence)

    def __str__(self) -> str:
        parts = [self.role, self.variant, f"b{self.batch}", f"t{self.threads}"]
        if self.sequence is not None:
            parts.append(f"s{self.sequence}")
        return ".".join(parts)


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure under its full name.

    Attributes:
        name: In full.
        aliases: Every name that means it, the full one first and the shortest last.
        value: None where the sample does not support it.
        missing: Why value is None.
    """

    name: str
    aliases: tuple[str, ...]
    value: float | None
    missing: str = ""


def cell_names(key: CellKey, first: CellKey) -> tuple[str, ...]:
    """Return every name of a cell, the full one first.

    Args:
        key: The cell.
        first: The first cell of the same role, whose batch, threads and sequence go without saying.
    """
    optional: list[tuple[str, ...]] = [(f".{key.variant}", "")]
    for letter, value, default in (
        ("b", key.batch, first.batch),
        ("t", key.threads, first.threads),
        ("s", key.sequence, first.sequence),
    ):
        if value is not None:
            optional.append(
                (f".{letter}{value}", "") if value == default else (f".{letter}{value}",)
            )
    return tuple(key.role + "".join(parts) for parts in product(*optional))


def stage_names(role: str, variant: str) -> tuple[str, ...]:
    """Return the names of an end-to-end call and its stages."""
    return (f"{role}.{variant}.end_to_end", f"{role}.end_to_end")


def expected_names(
    keys: Sequence[CellKey],
    *,
    cold_starts: bool,
    staged: Mapping[tuple[str, str], Sequence[str]],
    compared: Collection[tuple[str, str]],
    judged: Collection[tuple[str, str]],
) -> frozenset[str]:
    """Return every name that a profile of these cells will have, before it is measured.

    Args:
        keys: The cells to come.
        cold_starts: Whether cold start and memory will be measured.
        staged: The stages that will be, by role and variant.
        compared: Role and variant of those that have a baseline.
        judged: Role and variant of those with quality figures in the manifest.
    """
    names: set[str] = set()
    first = _first_of_role(keys)
    for key in keys:
        pair = (key.role, key.variant)
        figures = [*_CELL_METRICS, *(["ratio"] if pair in compared else [])]
        for base in cell_names(key, first[key.role]):
            names |= {f"{base}.{metric}" for metric in figures}
        figures = ["size_mb", *(_COLD_METRICS if cold_starts else ())]
        figures += _QUALITY_METRICS if pair in judged else ()
        for base in (f"{key.role}.{key.variant}", key.role):
            names |= {f"{base}.{metric}" for metric in figures}
    for (role, variant), stages in staged.items():
        figures = [*_LATENCY_METRICS, *(f"{stage}_ms" for stage in stages)]
        for base in stage_names(role, variant):
            names |= {f"{base}.{metric}" for metric in figures}
    return frozenset(names)


def _first_of_role(keys: Sequence[CellKey]) -> Mapping[str, CellKey]:
    first: dict[str, CellKey] = {}
    for key in keys:
        first.setdefault(key.role, key)
    return first


def metrics(profile: Profile) -> tuple[Metric, ...]:
    """Return every figure of a profile that a gate can name."""
    first = _first_of_role([CellKey.of(cell) for cell in profile.cells])
    found: list[Metric] = []
    for cell in profile.cells:
        names = cell_names(CellKey.of(cell), first[cell.role])
        found += (_metric(names, *figure) for figure in _cell_figures(cell))
    for variant in profile.variants:
        names = (f"{variant.role}.{variant.variant}", variant.role)
        found += (_metric(names, *figure) for figure in _variant_figures(variant))
    for stages in profile.stages:
        names = stage_names(stages.role, stages.variant)
        found += (_metric(names, *figure) for figure in _stage_figures(stages))
    return tuple(found)


def _metric(names: Sequence[str], metric: str, value: float | None, missing: str = "") -> Metric:
    aliases = tuple(f"{name}.{metric}" for name in names)
    return Metric(aliases[0], aliases, value, missing)


def _latency_figures(latency: Latency) -> Iterator[tuple[str, float | None, str]]:
    for percent in PERCENTILES:
        percentile = latency.percentiles.get(f"p{percent}")
        needed = required_samples(percent)
        yield (
            f"p{percent}_ms",
            percentile.value_ms if percentile else None,
            f"p{percent} needs {needed} runs, this sample has {latency.n}; raise --min-runs",
        )
    yield "mean_ms", latency.mean_ms, ""
    yield "min_ms", latency.min_ms, ""
    yield "max_ms", latency.max_ms, ""
    yield "cpu_ms", latency.cpu_ms, ""


def _cell_figures(cell: Cell) -> Iterator[tuple[str, float | None, str]]:
    yield from _latency_figures(cell.latency)
    yield "throughput_per_s", cell.throughput_per_s, ""
    if cell.baseline:
        yield "ratio", cell.baseline.ratio.median, ""


def _variant_figures(variant: VariantFigures) -> Iterator[tuple[str, float | None, str]]:
    yield "size_mb", variant.size_bytes / 1e6, ""
    if variant.cosine_mean is not None:
        yield "cosine_mean", variant.cosine_mean, ""
    if variant.cosine_p1 is not None:
        yield "cosine_p1", variant.cosine_p1, ""
    if variant.cold_start:
        yield "cold_start_ms", variant.cold_start.first_embedding_ms.median, ""
        yield "cold_start_cpu_ms", variant.cold_start.cpu_ms.median, ""
        yield "load_ms", variant.cold_start.load_ms.median, ""
    if variant.memory:
        yield "peak_memory_mb", variant.memory.peak_bytes / 1e6, ""
        yield "steady_memory_mb", variant.memory.steady_bytes / 1e6, ""


def _stage_figures(stages: StageBreakdown) -> Iterator[tuple[str, float | None, str]]:
    yield from _latency_figures(stages.end_to_end)
    for stage, value in stages.stages_ms.items():
        yield f"{stage}_ms", value, ""
