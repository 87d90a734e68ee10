"""A profile as one HTML page that needs nothing else: no script, no font, no network.

Its content security policy forbids everything but its own style. Whatever comes from the bundle or
the machine is escaped. What the plots show is in tables too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mmedge.bundle.manifest import Role
from mmedge.bundle.nodes import NodeTable
from mmedge.profiling.result import Cell, Latency, Profile, VariantFigures
from mmedge.profiling.statistics import PERCENTILES, SAMPLES_BEYOND, required_samples
from mmedge.reports import html_plots as plots
from mmedge.reports.html_nodes import render_nodes
from mmedge.reports.html_page import ABSENT, figure, figure_grid, html_table, moment, page
from mmedge.reports.html_tuning import search_sections
from mmedge.reports.svg_parts import number

__all__ = ["render_html"]

_MOST_CURVES = 6
_STAGES = ("decode", "resize", "normalize", "tokenize", "inference", "other")


def render_html(
    profile: Profile, nodes: Sequence[NodeTable] = (), *, roles: Mapping[str, Role] | None = None
) -> str:
    """Return the page.

    Args:
        profile: What was measured.
        nodes: Node tables of the variants, where the bundle has some (Bundle.nodes).
        roles: Of the bundle, by name, for what a search tried; None leaves that out.

    Returns:
        A complete HTML document, UTF-8 when encoded.
    """
    measured = list(dict.fromkeys(cell.role for cell in profile.cells))
    sections = [
        _header(profile),
        _cards(profile, measured),
        _gates(profile),
        _warnings(profile),
        *(_role(profile, role) for role in measured),
        _stages(profile, measured),
        _variants(profile),
        search_sections(roles or {}),
        *map(render_nodes, nodes),
        _about(profile),
    ]
    return page(f"{profile.bundle.name}: profile", sections)


def _header(profile: Profile) -> str:
    bundle, machine = profile.bundle, profile.machine
    engine = profile.cells[0].placement.engine
    return (
        f'<header><p class="eyebrow">mmedge profile</p><h1>{escape(bundle.name)}</h1>'
        f'<p class="soft">{escape(bundle.family)} · {escape(machine.cpu_model)}, '
        f"{len(machine.processors_allowed)} of {machine.processors_online} processors · "
        f"{escape(engine)} on {escape(profile.config.device)} · "
        f"{escape(moment(profile.created))}</p>"
        "</header>"
    )


def _cards(profile: Profile, roles: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(_card(profile, role) for role in roles)}</div>'


def _card(profile: Profile, role: str) -> str:
    """The fastest variant of a role, at the batch, threads and length asked for first."""
    cells = [cell for cell in profile.cells if cell.role == role]
    shape = (cells[0].batch, cells[0].threads, cells[0].sequence)
    same = [cell for cell in cells if (cell.batch, cell.threads, cell.sequence) == shape]
    best = min(same, key=lambda cell: _middle(cell.latency))
    figures = next(v for v in profile.variants if (v.role, v.variant) == (best.role, best.variant))
    facts = [("throughput", f"{number(best.throughput_per_s)} a second")]
    slowest = max(same, key=lambda cell: _middle(cell.latency))
    if slowest is not best:
        times = _middle(slowest.latency) / _middle(best.latency)
        facts.append((f"{slowest.variant} takes", f"{times:.2f} times as long"))
    if figures.cold_start:
        cold = figures.cold_start.first_embedding_ms.median
        facts.append(("cold start", f"{number(cold)} ms"))
    if figures.memory:
        facts.append(("peak memory", f"{number(figures.memory.peak_bytes / 1e6)} MB"))
    facts.append(("on disk", f"{number(figures.size_bytes / 1e6)} MB"))
    if figures.cosine_mean is not None:
        facts.append(("cosine with fp32", f"{figures.cosine_mean:.5f}"))
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    named = "median" if "p50" in best.latency.percentiles else "mean"
    return (
        f'<section class="card"><h3>{escape(role)}</h3>'
        f'<div class="big">{number(_middle(best.latency))} <small>ms</small></div>'
        f'<div class="soft">{named}, {escape(_in_words(best))}</div>'
        f"<dl>{rows}</dl></section>"
    )


def _in_words(cell: Cell) -> str:
    words = f"{cell.variant}, batch {cell.batch}, {cell.threads} thread{'s' * (cell.threads > 1)}"
    return words if cell.sequence is None else f"{words}, {cell.sequence} tokens"


def _middle(latency: Latency) -> float:
    """Return the median, or the mean of a sample too small for one."""
    median = latency.percentiles.get("p50")
    return median.value_ms if median else latency.mean_ms


def _gates(profile: Profile) -> str:
    if not profile.gates:
        return ""
    rows = [
        [
            '<span class="fail">failed</span>' if gate.failed else '<span class="pass">held</span>',
            escape(gate.metric),
            number(gate.got),
            escape(f"must not be {gate.op} {gate.limit:g}"),
        ]
        for gate in profile.gates
    ]
    failed = sum(gate.failed for gate in profile.gates)
    said = f"{failed} of {len(rows)} failed." if failed else "All held."
    return "<h2>Gates</h2>" + html_table(said, ["", "figure", "got", "limit"], rows, left=(0, 1, 3))


def _warnings(profile: Profile) -> str:
    if not profile.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in profile.warnings)
    return f'<div class="warn" role="note"><h3>Take with care</h3><ul>{items}</ul></div>'


def _role(profile: Profile, role: str) -> str:
    cells = [cell for cell in profile.cells if cell.role == role]
    first = cells[0]
    lengths = list(dict.fromkeys(cell.sequence for cell in cells))
    figures = []
    for length in lengths:
        shown = [cell for cell in cells if (cell.batch, cell.sequence) == (first.batch, length)]
        figures.append(
            figure(
                plots.latency_plot(_shape(role, first.batch, length), shown),
                "From the shortest run to the highest percentile that the sample supports.",
            )
        )
    shown = [c for c in cells if (c.batch, c.sequence) == (first.batch, first.sequence)]
    figures.append(
        figure(
            plots.distribution_plot(
                _shape(role, first.batch, first.sequence), shown[:_MOST_CURVES]
            ),
            "The slowest 2.5 % of the runs lie outside.",
        )
    )
    if len({cell.batch for cell in cells}) > 1:
        for length in lengths:
            shown = [cell for cell in cells if cell.sequence == length]
            plot = plots.throughput_plot(_shape(role, None, length), shown)
            figures.append(figure(plot, "Batch size over mean latency."))
    scatter = plots.fidelity_plot(profile, role)
    if scatter:
        caption = f"{_shape('', first.batch, first.sequence)}: higher and further left is better."
        figures.append(figure(scatter, caption.lstrip(", ").capitalize()))
    return f"<h2>{escape(role)}</h2>{_cell_table(cells)}{figure_grid(figures)}"


def _shape(role: str, batch: int | None, sequence: int | None) -> str:
    """Name a role and what its cells have in common."""
    parts = [role, *([] if batch is None else [f"batch {batch}"])]
    return ", ".join(parts + ([] if sequence is None else [f"{sequence} tokens"]))


def _cell_table(cells: Sequence[Cell]) -> str:
    tokens = any(cell.sequence is not None for cell in cells)
    compared = any(cell.baseline for cell in cells)
    names = [f"p{percent}" for percent in PERCENTILES]
    heads = ["variant", "batch", "threads", *(["tokens"] if tokens else []), "runs"]
    heads += [f"{name}, ms" for name in names] + ["per second"]
    heads += ["time / baseline"] if compared else []
    rows = []
    for cell in cells:
        row = [
            escape(cell.variant) + (' <span title="noisy">~</span>' if cell.noise else ""),
            str(cell.batch),
            str(cell.threads),
        ]
        if tokens:
            row.append(ABSENT if cell.sequence is None else str(cell.sequence))
        row.append(f"{cell.latency.n:,}")
        row += [_percentile(cell.latency, name) for name in names]
        row.append(number(cell.throughput_per_s))
        if compared:
            row.append(_ratio(cell))
        rows.append(row)
    return html_table(
        "Latency of a run. Small: the 95 % interval of the percentile."
        + (" Time relative to the baseline, interleaved: below 1 is faster." if compared else ""),
        heads,
        rows,
    )


def _interval(low: float, high: float) -> str:
    return f"{number(low)}\u2013{number(high)}"


def _percentile(latency: Latency, name: str) -> str:
    found = latency.percentiles.get(name)
    if found is None:
        needed = required_samples(int(name[1:]))
        return f'<span class="soft" title="needs {needed} runs, has {latency.n}">\u2013</span>'
    return f"{number(found.value_ms)}<small>{_interval(found.low_ms, found.high_ms)}</small>"


def _ratio(cell: Cell) -> str:
    if cell.baseline is None:
        return ABSENT
    ratio = cell.baseline.ratio
    return (
        f"{ratio.median:.3f}<small>{_interval(ratio.low, ratio.high)}<br>"
        f"{escape(cell.baseline.name)}</small>"
    )


def _stages(profile: Profile, roles: Sequence[str]) -> str:
    staged = [role for role in roles if any(item.role == role for item in profile.stages)]
    if not staged:
        return ""
    figures = []
    for role in staged:
        inputs = {item.input for item in profile.stages if item.role == role}
        caption = f"{', '.join(sorted(inputs))}; the mark is the end-to-end call."
        figures.append(figure(plots.stage_plot(profile, role), caption))
    known = {name for item in profile.stages for name in item.stages_ms}
    names = [name for name in _STAGES if name in known]
    rows = [
        [
            escape(f"{item.role} {item.variant}") + (" ~" if item.noise else ""),
            *(number(item.stages_ms[n]) if n in item.stages_ms else ABSENT for n in names),
            number(item.sum_ms),
            number(item.sum_ms + item.stages_ms["other"]),
        ]
        for item in profile.stages
    ]
    table = html_table(
        "Median ms at batch 1. Each stage is measured alone; the sum of the measured ones stands "
        "beside the end-to-end call, and other is the difference.",
        ["call", *names, "sum", "end to end"],
        rows,
    )
    return f"<h2>End to end: where the time goes</h2>{figure_grid(figures)}{table}"


def _variants(profile: Profile) -> str:
    figures = []
    if any(item.cold_start for item in profile.variants):
        figures.append(
            figure(plots.cold_plot(profile.variants), "Fresh processes, files in the page cache.")
        )
    if any(item.memory for item in profile.variants):
        figures.append(figure(plots.memory_plot(profile.variants), "Each role and variant alone."))
    rows = [_variant_row(item) for item in profile.variants]
    heads = [
        "role",
        "variant",
        "on disk, MB",
        "cold start, ms",
        "its CPU, ms",
        "load, ms",
        "peak, MB",
    ]
    heads += ["steady, MB", "cosine mean", "cosine p1"]
    table = html_table(
        "Whatever the batch. Medians over fresh processes.", heads, rows, left=(0, 1)
    )
    return f"<h2>Cold start, memory and size</h2>{figure_grid(figures)}{table}"


def _variant_row(item: VariantFigures) -> list[str]:
    cold, memory = item.cold_start, item.memory
    first = cold.first_embedding_ms if cold else None
    return [
        escape(item.role),
        escape(item.variant),
        number(item.size_bytes / 1e6),
        f"{number(first.median)}<small>{_interval(first.low, first.high)}</small>"
        if first
        else ABSENT,
        number(cold.cpu_ms.median) if cold else ABSENT,
        number(cold.load_ms.median) if cold else ABSENT,
        number(memory.peak_bytes / 1e6) if memory else ABSENT,
        number(memory.steady_bytes / 1e6) if memory else ABSENT,
        ABSENT if item.cosine_mean is None else f"{item.cosine_mean:.5f}",
        ABSENT if item.cosine_p1 is None else f"{item.cosine_p1:.5f}",
    ]


def _about(profile: Profile) -> str:
    machine, config, bundle = profile.machine, profile.config, profile.bundle
    loads = (machine.load_average_before, machine.load_average_after)
    placements = {f"{cell.role}.{cell.variant}": cell.placement for cell in profile.cells}
    needed = ", ".join(f"p{p} {required_samples(p)}" for p in PERCENTILES)
    facts = {
        "bundle": f"{bundle.path}, from {bundle.source}, made {bundle.created}",
        "processors": f"{machine.cpu_model}; allowed: {list(machine.processors_allowed)}",
        "governor": machine.governor or "not readable",
        "frequency": f"{machine.frequency_mhz} MHz" if machine.frequency_mhz else "not readable",
        "load average": " → ".join(
            "unknown" if load is None else " ".join(f"{x:.2f}" for x in load) for load in loads
        ),
        "system": machine.platform,
        "versions": ", ".join(f"{name} {v}" for name, v in machine.versions.items()),
        "placement": "; ".join(f"{name}: {p.summary}" for name, p in placements.items()),
        "each cell": f"{config.budget.warmup_seconds:g} s of warm-up, then at least "
        f"{config.budget.seconds:g} s and {config.budget.min_runs} runs",
        "clock": f"perf_counter_ns; it adds {machine.harness_overhead_ns:.0f} ns to a run",
        "percentiles": f"shown where {SAMPLES_BEYOND} or more runs are expected beyond them "
        f"(runs needed: {needed}); intervals from order statistics",
    }
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f'<h2>Machine and method</h2><div class="card"><dl class="facts">{rows}</dl></div>'
        f"<footer>Profile format {escape(profile.profile_version)}.</footer>"
    )
