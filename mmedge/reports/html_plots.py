"""The plots of the HTML report: which figures of a profile go into which plot."""

from __future__ import annotations

from collections.abc import Sequence

from mmedge.profiling.metrics import CellKey
from mmedge.profiling.result import Cell, Profile, VariantFigures
from mmedge.reports.svg import (
    Bar,
    Point,
    Range,
    Series,
    line_plot,
    range_plot,
    scatter_plot,
    stacked_bars,
)
from mmedge.reports.svg_parts import number

__all__ = [
    "cell_label",
    "cold_plot",
    "distribution_plot",
    "fidelity_plot",
    "latency_plot",
    "memory_plot",
    "stage_plot",
    "throughput_plot",
]

_MB = 1e6

# In the order of the colours; "other" gets the grey.
_STAGES = ("inference", "decode", "resize", "normalize", "tokenize", "other")


def cell_label(cell: Cell) -> str:
    """Return a cell's name within its role, as gates spell it."""
    return str(CellKey.of(cell)).removeprefix(f"{cell.role}.")


def _variants(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.variant for cell in cells))


def latency_plot(what: str, cells: Sequence[Cell]) -> str:
    """Draw a line a cell: shortest run to the highest percentile that its sample supports."""
    variants = _variants(cells)
    ranges = []
    for cell in cells:
        ticks = {name: p.value_ms for name, p in cell.latency.percentiles.items()}
        middle = ticks.pop("p50", cell.latency.mean_ms)
        low = cell.latency.min_ms
        note = f"p50 {number(middle)}"
        if ticks:
            note += f" · {max(ticks)} {number(max(ticks.values()))}"
        ranges.append(
            Range(
                label=cell_label(cell),
                low=low,
                high=max([middle, *ticks.values()]),
                middle=middle,
                ticks=ticks,
                note=note,
                series=variants.index(cell.variant),
            )
        )
    return range_plot(f"Latency: {what}", ranges, unit="ms a run")


def distribution_plot(what: str, cells: Sequence[Cell]) -> str:
    """Draw the share of runs that end within a time, without the slowest 2.5 %."""
    series = []
    for cell in cells:
        curve = cell.latency.curve_ms[:-1]  # one outlier would press everything else to the left
        share = [100.0 * i / (len(cell.latency.curve_ms) - 1) for i in range(len(curve))]
        series.append(Series(cell_label(cell), list(zip(curve, share, strict=True))))
    return line_plot(
        f"Distribution: {what}", series, x_name="ms a run", y_name="% of runs that took at most"
    )


def throughput_plot(what: str, cells: Sequence[Cell]) -> str:
    """Draw samples a second over the batch size, which is spaced evenly whatever its steps."""
    batches = sorted({cell.batch for cell in cells})
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.batch):
        name = cell_label(cell).replace(f".b{cell.batch}.", ".")
        place = float(batches.index(cell.batch))
        lines.setdefault(name, []).append((place, cell.throughput_per_s))
    return line_plot(
        f"Throughput: {what}",
        [Series(name, points, dots=True) for name, points in lines.items()],
        x_name="batch",
        y_name="samples a second",
        x_ticks={float(i): str(batch) for i, batch in enumerate(batches)},
    )


def stage_plot(profile: Profile, role: str) -> str:
    """Draw the measured stages side by side, and the end-to-end call as a mark across."""
    bars = []
    for item in profile.stages:
        if item.role == role:
            whole = item.sum_ms + item.stages_ms["other"]
            bars.append(
                Bar(
                    label=item.variant,
                    segments={k: max(v, 0.0) for k, v in item.stages_ms.items()},
                    note=f"end to end {number(whole)} ms",
                    mark=whole,
                )
            )
    return stacked_bars(f"Stages: {role}, end to end", bars, unit="ms (median)", order=_STAGES)


def cold_plot(variants: Sequence[VariantFigures]) -> str:
    """Draw the time from process start to the first embedding."""
    bars = []
    for item in variants:
        cold = item.cold_start
        if cold is None:
            continue
        parts = {
            "import": cold.import_ms.median,
            "load": cold.load_ms.median,
            "first run": cold.first_run_ms.median,
        }
        start = max(cold.first_embedding_ms.median - sum(parts.values()), 0.0)
        bars.append(
            Bar(
                label=f"{item.role} {item.variant}",
                segments={"interpreter": start, **parts},
                note=f"{number(cold.first_embedding_ms.median)} ms",
            )
        )
    return stacked_bars("Cold start", bars, unit="ms to the first embedding")


def memory_plot(variants: Sequence[VariantFigures]) -> str:
    """Draw peak memory, split into what is there before the model, with it, and while loading."""
    bars = []
    for item in variants:
        memory = item.memory
        if memory is None:
            continue
        before = min(memory.before_load_bytes, memory.steady_bytes)
        bars.append(
            Bar(
                label=f"{item.role} {item.variant}",
                segments={
                    "Python and mmedge": before / _MB,
                    "engine and model": (memory.steady_bytes - before) / _MB,
                    "only at the peak": max(memory.peak_bytes - memory.steady_bytes, 0) / _MB,
                },
                note=f"peak {number(memory.peak_bytes / _MB)} MB",
            )
        )
    return stacked_bars("Resident memory", bars, unit="MB resident")


def fidelity_plot(profile: Profile, role: str) -> str | None:
    """Draw quality over latency, the disc's area being the size; None without any quality."""
    points = []
    for item in profile.variants:
        cell = next((c for c in profile.cells if (c.role, c.variant) == (role, item.variant)), None)
        if item.role != role or cell is None or item.cosine_mean is None:
            continue
        median = cell.latency.percentiles.get("p50")
        points.append(
            Point(
                label=item.variant,
                x=median.value_ms if median else cell.latency.mean_ms,
                y=item.cosine_mean,
                size=item.size_bytes,
                note=f"{number(item.size_bytes / _MB)} MB, cosine {item.cosine_mean:.5f}",
            )
        )
    if not points:
        return None
    return scatter_plot(
        f"Size, latency, quality: {role}",
        points,
        x_name="ms a run (p50)",
        y_name="mean cosine with fp32 (disc area: size on disk)",
    )
