"""What a search tried, as an HTML page: every candidate with its reason, and the front in plots.

Names and reasons come from a bundle: everything is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Manifest, Role
from mmedge.bundle.nodes import NodeTable
from mmedge.bundle.search import Candidate, SearchRecord
from mmedge.reports.html_nodes import render_nodes
from mmedge.reports.html_page import ABSENT, figure, figure_grid, html_table, moment, page
from mmedge.reports.svg_front import Mark, front_plot
from mmedge.reports.svg_parts import number

__all__ = ["render_search", "search_sections"]

_MB = 1e6
_CHEAP = {"latency": "fast", "size": "small", "energy": "frugal"}
_SERIES = {"chosen": 2, "front": 0, "dropped": 5}


def render_search(manifest: Manifest, nodes: Mapping[str, NodeTable]) -> str:
    """Return a page on what was tried for a bundle and what became of its nodes.

    Args:
        manifest: Of the bundle; none of its strings is trusted.
        nodes: Node tables by any name, in the order in which they are to stand.

    Returns:
        A complete HTML document, UTF-8 when encoded. A role that was not searched has no section.
    """
    made = manifest.provenance
    searched = search_sections(manifest.roles)
    about = "search" if searched else "nodes"
    header = (
        f'<header><p class="eyebrow">mmedge {about}</p><h1>{escape(manifest.name)}</h1>'
        f'<p class="soft">{escape(manifest.family)} · from {escape(made.source)} · '
        f"{escape(moment(made.created))}</p></header>"
    )
    footer = f"<footer>Made by: {escape(made.command)}</footer>"
    sections = (header, searched, *map(render_nodes, nodes.values()), footer)
    return page(f"{manifest.name}: {about}", sections)


def search_sections(roles: Mapping[str, Role]) -> str:
    """Return a section for each role that was searched, for a page; "" where none was.

    Args:
        roles: By name; none of their strings is trusted.
    """
    return "".join(
        _section(name, role.search) for name, role in roles.items() if role.search is not None
    )


def _section(role: str, record: SearchRecord) -> str:
    chosen = next(one for one in record.candidates if one.verdict == "chosen")
    return (
        f'<section class="search"><h2>Search: {escape(role)}</h2>'
        f'<div class="grid">{_outcome(chosen, record)}{_asked(record)}</div>'
        f"{figure_grid(_plots(role, record))}{_candidates(role, record)}</section>"
    )


def _outcome(chosen: Candidate, record: SearchRecord) -> str:
    facts = []
    fp32 = record.candidates[0]
    if chosen.drop is not None:
        facts.append((f"{record.metric} lost", _in_words(chosen.drop, record)))
    if chosen.speed is not None:
        facts.append(
            ("one call", f"{number(chosen.speed.latency_ms)} ms in {chosen.speed.backend}")
        )
        if chosen is not fp32:
            facts.append(("of fp32's time", f"{chosen.speed.ratio.value:.2f}"))
        if chosen.speed.energy_mj is not None:
            facts.append(("energy of one call", f"{number(chosen.speed.energy_mj)} mJ"))
    if chosen.size_bytes is not None:
        facts.append(("size", f"{number(chosen.size_bytes / _MB)} MB"))
        if chosen is not fp32 and fp32.size_bytes:
            facts.append(("of fp32's size", f"{chosen.size_bytes / fp32.size_bytes:.2f}"))
    if record.joint_drop is not None:
        facts.append(("lost, all roles as chosen", _in_words(record.joint_drop, record)))
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    return (
        f'<div class="card"><h3>Chosen: {escape(chosen.variant)}</h3>'
        f'<p class="soft">{escape(chosen.reason)}</p><dl>{rows}</dl></div>'
    )


def _asked(record: SearchRecord) -> str:
    dropped = sum(one.verdict == "dropped" for one in record.candidates)
    facts = {
        "wanted": f"as {_CHEAP[record.objective]} as possible",
        "may lose": f"{record.max_drop:g} of {record.metric}",
        "fidelity on": f"{record.data} (n = {record.samples})",
        "speed on": f"{record.processor}, {record.threads} thread{'s' * (record.threads > 1)}",
        "tried": f"{len(record.candidates)}, of which {dropped} dropped",
    }
    if record.energy_counter is not None:
        facts["energy by"] = f"{record.energy_counter}, what the idle machine takes included"
    seconds = sum(one.duration_s for one in record.candidates)
    if seconds:
        facts["took"] = f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f'<div class="card"><h3>Asked for</h3><dl class="facts">{rows}</dl></div>'


def _plots(role: str, record: SearchRecord) -> list[str]:
    reference = record.candidates[0].speed
    fp32_ms = "" if reference is None else f" ({number(reference.latency_ms)} ms)"
    costs: tuple[tuple[str, str, Callable[[Candidate], float | None]], ...] = (
        # Candidates were timed at different times, each in turns with fp32: ratios compare.
        ("latency", f"time of a call, fp32{fp32_ms} being 1", _relative_latency),
        ("size", "MB on disk", _size_mb),
        ("energy", "mJ a call, idle machine included", _energy_mj),
    )
    drawn = []
    for what, unit, cost in costs:
        marks = [
            _mark(index, one, drop, x, one.speed.ratio if what == "latency" and one.speed else None)
            for index, one in enumerate(record.candidates)
            if (drop := _drop(one)) is not None and (x := cost(one)) is not None and x > 0
        ]
        if not marks:
            continue
        left_out = len(record.candidates) - len(marks)
        caption = (
            "Left and down is better. Numbers: rows of the table. Line: the front, the least loss "
            "of what was kept, at each cost. Arrow: lies beyond."
        )
        if left_out:
            caption += f" Not measured, so not here: {left_out}."
        svg = front_plot(
            f"Loss against {what}: {role}",
            marks,
            budget=record.max_drop,
            x_name=unit,
            y_name=f"{record.metric} lost to fp32",
        )
        drawn.append(figure(svg, caption))
    return drawn


def _relative_latency(one: Candidate) -> float | None:
    return None if one.speed is None else one.speed.ratio.value


def _size_mb(one: Candidate) -> float | None:
    return None if one.size_bytes is None else one.size_bytes / _MB


def _energy_mj(one: Candidate) -> float | None:
    return None if one.speed is None else one.speed.energy_mj


def _drop(one: Candidate) -> Figure | None:
    """Return what a candidate loses; fp32 loses nothing to itself, measured or not."""
    if one.drop is None and one.variant == "fp32":
        return Figure(value=0.0, low=0.0, high=0.0)
    return one.drop


def _mark(index: int, one: Candidate, drop: Figure, cost: float, around: Figure | None) -> Mark:
    return Mark(
        label=str(index + 1),
        name=f"{one.variant}, {one.verdict}: {one.reason}",
        x=cost,
        y=drop.value,
        low=drop.low,
        high=drop.high,
        kind=one.verdict,
        x_low=None if around is None else around.low,
        x_high=None if around is None else around.high,
    )


def _candidates(role: str, record: SearchRecord) -> str:
    energy = any(_energy_mj(one) is not None for one in record.candidates)
    heads = ["candidate", "verdict and reason", f"{record.metric} lost", "cosine", "size, MB"]
    heads += ["ms a call", "of fp32's time", *(["mJ a call"] if energy else []), "backend"]
    heads.append("took, s")
    rows = [_row(index, one, record, energy=energy) for index, one in enumerate(record.candidates)]
    caption = (
        f"Everything that was tried for {role}, in this order, with 95 % intervals. "
        "chosen: what load takes; front: in the bundle too; dropped: not in it."
    )
    return html_table(caption, heads, rows, left=(0, 1, heads.index("backend")))


def _row(index: int, one: Candidate, record: SearchRecord, *, energy: bool) -> list[str]:
    speed = one.speed
    verdict = f'<span class="chip s{_SERIES[one.verdict]}">{one.verdict}</span>'
    row = [
        f'<span class="soft">{index + 1}</span> {_breakable(one.variant)}',
        f"{verdict}<small>{escape(one.reason)}</small>",
        ABSENT if one.drop is None else _cell(one.drop, _decimals(record)),
        ABSENT if one.cosine_mean is None else f"{one.cosine_mean:.5f}",
        ABSENT if one.size_bytes is None else number(one.size_bytes / _MB),
        ABSENT if speed is None else number(speed.latency_ms),
        ABSENT if speed is None else _cell(speed.ratio, 2),
    ]
    if energy:
        millijoules = _energy_mj(one)
        row.append(ABSENT if millijoules is None else number(millijoules))
    row.append(ABSENT if speed is None else escape(speed.backend))
    row.append(number(one.duration_s) if one.duration_s else ABSENT)
    return row


def _cell(known: Figure, decimals: int) -> str:
    text = f"{known.value:.{decimals}f}"
    if known.low == known.high:
        return text
    return f"{text}<small>{known.low:.{decimals}f} to {known.high:.{decimals}f}</small>"


def _in_words(known: Figure, record: SearchRecord) -> str:
    decimals = _decimals(record)
    text = f"{known.value:.{decimals}f}"
    if known.low == known.high:
        return text
    return f"{text} ({known.low:.{decimals}f} to {known.high:.{decimals}f})"


def _decimals(record: SearchRecord) -> int:
    """Return so many decimals that the budget has two figures."""
    if record.max_drop <= 0:
        return 4
    return min(max(3, 1 - math.floor(math.log10(record.max_drop))), 8)


def _breakable(name: str) -> str:
    """Escape a name and let a narrow page break it where its parts meet."""
    return escape(name).replace("-", "-<wbr>")
