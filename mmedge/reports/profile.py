"""HTML report of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape

from mmedge.bundle.manifest import Role
from mmedge.bundle.nodes import NodeTable
from mmedge.profiling.metrics import CellKey
from mmedge.profiling.result import Cell, Profile, StageBreakdown, VariantFigures
from mmedge.profiling.statistics import PERCENTILES, SAMPLES_BEYOND, required_samples
from mmedge.reports import charts
from mmedge.reports.charts import number
from mmedge.reports.nodes import render_nodes
from mmedge.reports.page import card, definitions, figures, header, page, table
from mmedge.reports.tuning import search_sections

__all__ = ["render_profile"]

_MB = 1e6
_MOST_CURVES = 6
# In the order of the colours; "other" is grey.
_STAGE_COLOURS = ("inference", "decode", "resize", "normalize", "tokenize", "other")
_STAGES = ("decode", "resize", "normalize", "tokenize", "inference", "other")


def render_profile(
    profile: Profile, nodes: Sequence[NodeTable] = (), *, roles: Mapping[str, Role] | None = None
) -> str:
    """Return the page.

    Args:
        profile: What was measured.
        nodes: Node tables of the variants (Bundle.nodes).
        roles: Roles of the bundle by name, for the search sections; None leaves them out.

    Returns:
        A complete HTML document, UTF-8 when encoded.
    """
    by_role: dict[str, list[Cell]] = {}
    for cell in profile.cells:
        by_role.setdefault(cell.role, []).append(cell)
    cards = "".join(_card(profile, cells) for cells in by_role.values())
    sections = [
        _header(profile),
        f'<div class="grid">{cards}</div>',
        _gates(profile),
        _warnings(profile),
        *(_role(profile, role, cells) for role, cells in by_role.items()),
        _stages(profile),
        _variants(profile),
        search_sections(roles or {}),
        *map(render_nodes, nodes),
        _about(profile),
    ]
    return page(f"{profile.bundle.name}: profile", sections)


def _header(profile: Profile) -> str:
    machine, engine = profile.machine, profile.cells[0].placement.engine
    cpus = f"{len(machine.processors_allowed)} of {machine.processors_online} CPUs"
    return header(
        "profile",
        profile.bundle.name,
        profile.bundle.family,
        f"{machine.cpu_model}, {cpus}",
        f"{engine} on {profile.config.device}",
        created=profile.created,
    )


def _card(profile: Profile, cells: Sequence[Cell]) -> str:
    """The fastest variant of a role at the first batch size, thread count and length."""
    first = cells[0]
    shape = (first.batch, first.threads, first.sequence)
    same = [cell for cell in cells if (cell.batch, cell.threads, cell.sequence) == shape]
    best, slowest = (f(same, key=lambda cell: cell.latency.median_ms) for f in (min, max))
    variant = next(v for v in profile.variants if (v.role, v.variant) == (best.role, best.variant))
    facts: dict[str, str | None] = {"throughput": f"{number(best.throughput_per_s)} per second"}
    if slowest is not best:
        times = slowest.latency.median_ms / best.latency.median_ms
        facts["speed"] = f"{times:.2f}x faster than {slowest.variant}"
    if variant.cold_start:
        facts["cold start"] = f"{number(variant.cold_start.first_embedding_ms.median)} ms"
    if variant.memory:
        facts["peak memory"] = f"{number(variant.memory.peak_bytes / _MB)} MB"
    facts["on disk"] = f"{number(variant.size_bytes / _MB)} MB"
    facts["cosine with fp32"] = _cosine(variant.cosine_mean)
    threads = f"{best.threads} thread{'s' * (best.threads > 1)}"
    about = f"median, {_shape(best.variant, best.batch, None)}, {threads}"
    about += "" if best.sequence is None else f", {best.sequence} tokens"
    return card(
        best.role,
        f'<div class="big">{number(best.latency.median_ms)} <small>ms</small></div>',
        f'<div class="soft">{escape(about)}</div>',
        definitions(facts),
    )


def _gates(profile: Profile) -> str:
    if not profile.gates:
        return ""
    failed = sum(gate.failed for gate in profile.gates)
    shown = table(
        f"{failed} of {len(profile.gates)} failed." if failed else "All passed.",
        profile.gates,
        {
            "result": lambda gate: (
                f'<span class="{"fail" if gate.failed else "pass"}">'
                f"{'failed' if gate.failed else 'passed'}</span>"
            ),
            "metric": lambda gate: escape(gate.metric),
            "value": lambda gate: number(gate.got),
            "fails if": lambda gate: escape(f"{gate.op} {gate.limit:g}"),
        },
        left=("metric", "fails if"),
    )
    return f"<h2>Gates</h2>{shown}"


def _warnings(profile: Profile) -> str:
    if not profile.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in profile.warnings)
    return f'<div class="warn" role="note"><h3>Warnings</h3><ul>{items}</ul></div>'


def _role(profile: Profile, role: str, cells: Sequence[Cell]) -> str:
    first = cells[0]
    lengths = list(dict.fromkeys(cell.sequence for cell in cells))
    drawn = {}
    for length in lengths:
        shown = [cell for cell in cells if (cell.batch, cell.sequence) == (first.batch, length)]
        chart = _latency_chart(_shape(role, first.batch, length), shown)
        drawn[chart] = "From the shortest run to the highest percentile that the sample supports."
    same = [c for c in cells if (c.batch, c.sequence) == (first.batch, first.sequence)]
    chart = _distribution_chart(_shape(role, first.batch, first.sequence), same[:_MOST_CURVES])
    drawn[chart] = "Without the slowest 2.5 % of the runs."
    if len({cell.batch for cell in cells}) > 1:
        for length in lengths:
            shown = [cell for cell in cells if cell.sequence == length]
            chart = _throughput_chart(_shape(role, None, length), shown)
            drawn[chart] = "Batch size / mean latency."
    if quality := _quality_chart(profile, role):
        shape = _shape("", first.batch, first.sequence).removeprefix(", ")
        drawn[quality] = f"{shape.capitalize()}. Upper left is better."
    return f"<h2>{escape(role)}</h2>{_latency_table(cells)}{figures(drawn)}"


def _shape(name: str, batch: int | None, sequence: int | None) -> str:
    """Describe what cells have in common."""
    parts = [name, *([] if batch is None else [f"batch {batch}"])]
    return ", ".join(parts + ([] if sequence is None else [f"{sequence} tokens"]))


def _latency_table(cells: Sequence[Cell]) -> str:
    columns: dict[str, Callable[[Cell], str | None]] = {
        "variant": lambda cell: (
            escape(cell.variant) + (' <span title="noisy">~</span>' if cell.noise else "")
        ),
        "batch": lambda cell: str(cell.batch),
        "threads": lambda cell: str(cell.threads),
    }
    if any(cell.sequence is not None for cell in cells):
        columns["tokens"] = lambda cell: None if cell.sequence is None else str(cell.sequence)
    columns["runs"] = lambda cell: f"{cell.latency.n:,}"
    for name in (f"p{percent}" for percent in PERCENTILES):
        columns[f"{name}, ms"] = partial(_percentile, name)
    columns["per second"] = lambda cell: number(cell.throughput_per_s)
    caption = "Latency per run. Small: 95 % interval of the percentile."
    if any(cell.baseline for cell in cells):
        columns["time / baseline"] = _ratio
        caption += " Time relative to the baseline, interleaved: below 1 is faster."
    return table(caption, cells, columns)


def _small(value: str, low: float, high: float, more: str = "") -> str:
    """Return a table cell with an interval and more HTML in small print below its value."""
    return f"{value}<small>{number(low)}\u2013{number(high)}{more}</small>"


def _percentile(name: str, cell: Cell) -> str:
    found = cell.latency.percentiles.get(name)
    if found is None:
        needed = required_samples(int(name[1:]))
        return f'<span class="soft" title="needs {needed} runs, has {cell.latency.n}">\u2013</span>'
    return _small(number(found.value_ms), found.low_ms, found.high_ms)


def _ratio(cell: Cell) -> str | None:
    if cell.baseline is None:
        return None
    ratio = cell.baseline.ratio
    name = f"<br>{escape(cell.baseline.name)}"
    return _small(f"{ratio.median:.3f}", ratio.low, ratio.high, name)


def _stages(profile: Profile) -> str:
    if not profile.stages:
        return ""
    drawn = {}
    for role in dict.fromkeys(item.role for item in profile.stages):
        items = [item for item in profile.stages if item.role == role]
        bars = [
            charts.Bar(
                item.variant,
                item.stages_ms,
                f"end to end {number(item.end_to_end.median_ms)} ms",
                item.end_to_end.median_ms,
            )
            for item in items
        ]
        title = f"Stages: {role}, end to end"
        chart = charts.stacked_bars(title, bars, unit="ms (median)", order=_STAGE_COLOURS)
        inputs = ", ".join(sorted({item.input for item in items}))
        drawn[chart] = f"{inputs}; the mark is the end-to-end call."
    shown = table(
        "Median ms at batch 1. Each stage is measured alone; other is what the end-to-end call "
        "takes beyond their sum.",
        profile.stages,
        {
            "call": lambda item: (
                escape(f"{item.role} {item.variant}") + (" ~" if item.noise else "")
            ),
            **{
                name: partial(_stage, name)
                for name in _STAGES
                if any(name in item.stages_ms for item in profile.stages)
            },
            "sum": lambda item: number(item.sum_ms),
            "end to end": lambda item: number(item.end_to_end.median_ms),
        },
    )
    return f"<h2>Stages of an end-to-end call</h2>{figures(drawn)}{shown}"


def _stage(name: str, item: StageBreakdown) -> str | None:
    return number(item.stages_ms[name]) if name in item.stages_ms else None


def _variants(profile: Profile) -> str:
    drawn = {}
    if any(item.cold_start for item in profile.variants):
        drawn[_cold_chart(profile.variants)] = "New processes, files in the page cache."
    if any(item.memory for item in profile.variants):
        drawn[_memory_chart(profile.variants)] = "Each role and variant alone."

    columns: dict[str, Callable[[VariantFigures], str | None]] = {
        "role": lambda item: escape(item.role),
        "variant": lambda item: escape(item.variant),
        "on disk, MB": lambda item: number(item.size_bytes / _MB),
        "cold start, ms": _first_embedding,
        "cold start CPU, ms": lambda item: (
            number(item.cold_start.cpu_ms.median) if item.cold_start else None
        ),
        "load, ms": lambda item: (
            number(item.cold_start.load_ms.median) if item.cold_start else None
        ),
        "peak, MB": lambda item: number(item.memory.peak_bytes / _MB) if item.memory else None,
        "steady, MB": lambda item: number(item.memory.steady_bytes / _MB) if item.memory else None,
        "cosine mean": lambda item: _cosine(item.cosine_mean),
        "cosine p1": lambda item: _cosine(item.cosine_p1),
    }
    shown = table(
        "Independent of the batch size. Medians over new processes.",
        profile.variants,
        columns,
        left=("variant",),
    )
    return f"<h2>Cold start, memory and size</h2>{figures(drawn)}{shown}"


def _first_embedding(item: VariantFigures) -> str | None:
    if item.cold_start is None:
        return None
    first = item.cold_start.first_embedding_ms
    return _small(number(first.median), first.low, first.high)


def _cosine(value: float | None) -> str | None:
    return None if value is None else f"{value:.5f}"


def _about(profile: Profile) -> str:
    machine, config, bundle = profile.machine, profile.config, profile.bundle
    loads = (machine.load_average_before, machine.load_average_after)
    placements = {f"{cell.role}.{cell.variant}": cell.placement for cell in profile.cells}
    needed = ", ".join(f"p{p} {required_samples(p)}" for p in PERCENTILES)
    facts = {
        "bundle": f"{bundle.path}, from {bundle.source}, created {bundle.created}",
        "CPU": f"{machine.cpu_model}; allowed: {list(machine.processors_allowed)}",
        "governor": machine.governor or "not readable",
        "frequency": f"{machine.frequency_mhz} MHz" if machine.frequency_mhz else "not readable",
        "load average": " → ".join(
            "unknown" if load is None else " ".join(f"{x:.2f}" for x in load) for load in loads
        ),
        "system": machine.platform,
        "versions": ", ".join(f"{name} {v}" for name, v in machine.versions.items()),
        "placement": "; ".join(f"{name}: {p.summary}" for name, p in placements.items()),
        "measurement": f"{config.budget.warmup_seconds:g} s of warm-up, then at least "
        f"{config.budget.seconds:g} s and {config.budget.min_runs} runs",
        "clock": f"perf_counter_ns, which adds {machine.harness_overhead_ns:.0f} ns to a run",
        "percentiles": f"shown where {SAMPLES_BEYOND} or more runs are expected beyond them "
        f"(runs needed: {needed}); intervals from order statistics",
    }
    return (
        f'<h2>Machine and method</h2><div class="card">{definitions(facts, "facts")}</div>'
        f"<footer>Profile format {escape(profile.profile_version)}.</footer>"
    )


def _cell_label(cell: Cell) -> str:
    """Return a cell's name within its role, as in gates."""
    return str(CellKey.of(cell)).removeprefix(f"{cell.role}.")


def _latency_chart(what: str, cells: Sequence[Cell]) -> str:
    """Draw each cell from its shortest run to its highest supported percentile."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    ranges = []
    for cell in cells:
        ticks = {name: p.value_ms for name, p in cell.latency.percentiles.items() if name != "p50"}
        middle, highest = cell.latency.median_ms, max(ticks, default="")
        ranges.append(
            charts.Range(
                label=_cell_label(cell),
                low=cell.latency.min_ms,
                high=max(middle, *ticks.values(), 0.0),
                middle=middle,
                ticks=ticks,
                note=f"p50 {number(middle)}"
                + (f" · {highest} {number(ticks[highest])}" if ticks else ""),
                series=variants.index(cell.variant),
            )
        )
    return charts.range_chart(f"Latency: {what}", ranges, unit="ms per run")


def _distribution_chart(what: str, cells: Sequence[Cell]) -> str:
    """Draw the share of runs within a time, without the slowest 2.5 %."""
    series = []
    for cell in cells:
        steps = len(cell.latency.curve_ms) - 1
        curve = cell.latency.curve_ms[:-1]  # one outlier would flatten the rest
        points = [(ms, 100.0 * i / steps) for i, ms in enumerate(curve)]
        series.append(charts.Series(_cell_label(cell), points))
    title = f"Distribution: {what}"
    return charts.line_chart(title, series, x_name="ms per run", y_name="% of runs within")


def _throughput_chart(what: str, cells: Sequence[Cell]) -> str:
    """Draw throughput over batch size, evenly spaced."""
    batches = sorted({cell.batch for cell in cells})
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.batch):
        name = _cell_label(cell).replace(f".b{cell.batch}.", ".")
        place = float(batches.index(cell.batch))
        lines.setdefault(name, []).append((place, cell.throughput_per_s))
    return charts.line_chart(
        f"Throughput: {what}",
        [charts.Series(name, points, dots=True) for name, points in lines.items()],
        x_name="batch size",
        y_name="samples per second",
        x_ticks={float(i): str(batch) for i, batch in enumerate(batches)},
    )


def _cold_chart(variants: Sequence[VariantFigures]) -> str:
    bars = []
    for item in variants:
        if (cold := item.cold_start) is None:
            continue
        total = cold.first_embedding_ms.median
        parts = {
            "import": cold.import_ms.median,
            "load": cold.load_ms.median,
            "first run": cold.first_run_ms.median,
        }
        parts = {"interpreter": max(total - sum(parts.values()), 0.0), **parts}
        bars.append(charts.Bar(f"{item.role} {item.variant}", parts, f"{number(total)} ms"))
    return charts.stacked_bars("Cold start", bars, unit="ms to the first embedding")


def _memory_chart(variants: Sequence[VariantFigures]) -> str:
    bars = []
    for item in variants:
        if (memory := item.memory) is None:
            continue
        before = min(memory.before_load_bytes, memory.steady_bytes)
        parts = {
            "Python and mmedge": before / _MB,
            "engine and model": (memory.steady_bytes - before) / _MB,
            "peak only": max(memory.peak_bytes - memory.steady_bytes, 0) / _MB,
        }
        peak = f"peak {number(memory.peak_bytes / _MB)} MB"
        bars.append(charts.Bar(f"{item.role} {item.variant}", parts, peak))
    return charts.stacked_bars("Resident memory", bars, unit="MB resident")


def _quality_chart(profile: Profile, role: str) -> str | None:
    """Draw quality over latency with size as disc area; None without quality."""
    points = []
    for item in profile.variants:
        cell = next((c for c in profile.cells if (c.role, c.variant) == (role, item.variant)), None)
        if item.role != role or cell is None or item.cosine_mean is None:
            continue
        note = f"{number(item.size_bytes / _MB)} MB, cosine {item.cosine_mean:.5f}"
        x, y = cell.latency.median_ms, item.cosine_mean
        points.append(charts.Point(item.variant, x, y, item.size_bytes, note))
    if not points:
        return None
    return charts.scatter_chart(
        f"Size, latency, quality: {role}",
        points,
        x_name="ms per run (p50)",
        y_name="mean cosine with fp32 (disc area: size on disk)",
    )
