"""HTML report of a precision search: candidates with reasons, and Pareto charts.

Names and reasons come from a bundle and are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from mmedge.bundle.manifest import Manifest, Role
from mmedge.bundle.nodes import NodeTable
from mmedge.bundle.opening import Bundle
from mmedge.bundle.quality import Figure
from mmedge.bundle.tuning import Candidate, SearchRecord
from mmedge.errors import InputError
from mmedge.reports.charts import number
from mmedge.reports.nodes import render_nodes
from mmedge.reports.page import breakable, card, definitions, figures, header, page, table
from mmedge.reports.pareto import OUTCOMES, Mark, pareto_chart

__all__ = ["render_bundle", "render_search", "search_sections"]

_MB = 1e6
_SERIES = {"chosen": 2, "front": 0, "dropped": 5}


def render_bundle(bundle: Bundle) -> str:
    """Return a page on the search behind a bundle and on its nodes.

    Raises:
        InputError: If the bundle holds neither a search nor a node table.
        ManifestError: If a node table cannot be read.
    """
    manifest = bundle.manifest
    nodes = {
        f"{name}/{variant.name}": found
        for name, role in manifest.roles.items()
        for variant in role.variants
        if (found := bundle.nodes(variant)) is not None
    }
    if not nodes and all(role.search is None for role in manifest.roles.values()):
        raise InputError(
            f"{bundle.path} has neither a search nor node tables, so --html would be empty. "
            "Convert again with 'mmedge convert --precision auto' or '--explain'."
        )
    return render_search(manifest, nodes)


def render_search(manifest: Manifest, nodes: Mapping[str, NodeTable]) -> str:
    """Return a page on the search behind a bundle and on its nodes.

    Args:
        manifest: The bundle's; its strings are not trusted.
        nodes: Node tables in the order in which they are shown.

    Returns:
        A complete HTML document. A role without a search has no section.
    """
    made = manifest.provenance
    searched = search_sections(manifest.roles)
    kind = "search" if searched else "nodes"
    sections = (
        header(kind, manifest.name, manifest.family, f"from {made.source}", created=made.created),
        searched,
        *map(render_nodes, nodes.values()),
        f"<footer>Command: {escape(made.command)}</footer>",
    )
    return page(f"{manifest.name}: {kind}", sections)


def search_sections(roles: Mapping[str, Role]) -> str:
    """Return one section per role with a search, "" if there is none.

    Args:
        roles: By name; their strings are not trusted.
    """
    return "".join(
        _section(name, role.search) for name, role in roles.items() if role.search is not None
    )


def _section(role: str, record: SearchRecord) -> str:
    return (
        f'<section class="search"><h2>Search: {escape(role)}</h2>'
        f'<div class="grid">{_result(record)}{_request(record)}</div>'
        f"{figures(_charts(role, record))}{_candidates(role, record)}</section>"
    )


def _result(record: SearchRecord) -> str:
    fp32 = record.candidates[0]
    decimals = record.decimals
    chosen = next(one for one in record.candidates if one.verdict == "chosen")
    facts: dict[str, str | None] = {f"{record.metric} loss": _interval(chosen.drop, decimals)}
    if (speed := chosen.speed) is not None:
        facts["latency"] = f"{number(speed.latency_ms)} ms in {speed.backend}"
        if chosen is not fp32:
            facts["time relative to fp32"] = f"{speed.ratio.value:.2f}"
        if speed.energy_mj is not None:
            facts["energy per call"] = f"{number(speed.energy_mj)} mJ"
    if chosen.size_bytes is not None:
        facts["size"] = f"{number(chosen.size_bytes / _MB)} MB"
        if chosen is not fp32 and fp32.size_bytes:
            facts["size relative to fp32"] = f"{chosen.size_bytes / fp32.size_bytes:.2f}"
    facts["loss, all roles as chosen"] = _interval(record.joint_drop, decimals)
    reason = f'<p class="soft">{escape(chosen.reason)}</p>'
    return card(f"Chosen: {chosen.variant}", reason, definitions(facts))


def _request(record: SearchRecord) -> str:
    dropped = sum(one.verdict == "dropped" for one in record.candidates)
    seconds = sum(one.duration_s for one in record.candidates)
    counter = record.energy_counter
    facts = {
        "objective": record.objective,
        "accuracy budget": f"{record.max_drop:g} of {record.metric}",
        "quality data": f"{record.data} (n = {record.samples})",
        "measured on": f"{record.processor}, {record.threads} thread{'s' * (record.threads > 1)}",
        "candidates": f"{len(record.candidates)}, {dropped} dropped",
        "energy counter": f"{counter}, including the idle machine" if counter else None,
        "duration": f"{seconds:.0f} s" if seconds else None,
    }
    return card("Request", definitions(facts, "facts"))


def _charts(role: str, record: SearchRecord) -> dict[str, str]:
    reference = record.candidates[0].speed
    fp32_ms = f" ({number(reference.latency_ms)} ms)" if reference else ""
    costs: tuple[tuple[str, str, Callable[[Candidate], float | None]], ...] = (
        # Candidates were timed at different times, alternating with fp32, so only ratios compare.
        (
            "latency",
            f"time relative to fp32{fp32_ms}",
            lambda one: one.speed.ratio.value if one.speed else None,
        ),
        ("size", "MB on disk", lambda one: one.size_bytes / _MB if one.size_bytes else None),
        ("energy", "mJ per call, idle machine included", _energy_mj),
    )
    charts = {}
    for name, unit, cost in costs:
        marks = []
        for index, one in enumerate(record.candidates):
            drop, x = _drop(one), cost(one)
            if drop is None or not x:
                continue
            ratio = one.speed.ratio if name == "latency" and one.speed else None
            marks.append(
                Mark(
                    label=str(index + 1),
                    name=f"{one.variant}, {OUTCOMES[one.verdict]}: {one.reason}",
                    x=x,
                    y=drop.value,
                    low=drop.low,
                    high=drop.high,
                    kind=one.verdict,
                    x_low=ratio.low if ratio else None,
                    x_high=ratio.high if ratio else None,
                )
            )
        if not marks:
            continue
        svg = pareto_chart(
            f"Loss against {name}: {role}",
            marks,
            budget=record.max_drop,
            x_name=unit,
            y_name=f"{record.metric} loss against fp32",
        )
        absent = len(record.candidates) - len(marks)
        charts[svg] = (
            "Lower left is better. Numbers: rows of the table. Line: Pareto front of the kept "
            "candidates. Arrow: outside the chart."
            + (f" Not measured: {absent} of {len(record.candidates)}." if absent else "")
        )
    return charts


def _drop(one: Candidate) -> Figure | None:
    """Return a candidate's loss; 0 for fp32, the reference."""
    if one.drop is None and one.variant == "fp32":
        return Figure(value=0.0, low=0.0, high=0.0)
    return one.drop


def _energy_mj(one: Candidate) -> float | None:
    return one.speed.energy_mj if one.speed else None


def _candidates(role: str, record: SearchRecord) -> str:
    numbers = {id(one): number for number, one in enumerate(record.candidates, 1)}
    columns: dict[str, Callable[[Candidate], str | None]] = {
        "candidate": lambda one: (
            f'<span class="soft">{numbers[id(one)]}</span> {breakable(one.variant)}'
        ),
        "result and reason": lambda one: (
            f'<span class="chip s{_SERIES[one.verdict]}">{OUTCOMES[one.verdict]}</span>'
            f"<small>{escape(one.reason)}</small>"
        ),
        f"{record.metric} loss": lambda one: _cell(one.drop, record.decimals),
        "cosine": lambda one: None if one.cosine_mean is None else f"{one.cosine_mean:.5f}",
        "size, MB": lambda one: number(one.size_bytes / _MB) if one.size_bytes else None,
        "ms per call": lambda one: number(one.speed.latency_ms) if one.speed else None,
        "relative to fp32": lambda one: _cell(one.speed.ratio, 2) if one.speed else None,
        "mJ per call": lambda one: number(mj) if (mj := _energy_mj(one)) else None,
        "backend": lambda one: escape(one.speed.backend) if one.speed else None,
        "duration, s": lambda one: number(one.duration_s) if one.duration_s else None,
    }
    if not any(map(_energy_mj, record.candidates)):
        del columns["mJ per call"]
    caption = (
        f"All candidates for {role}, in the order of the search, with 95 % intervals. chosen: "
        "what load() uses; kept (Pareto): also in the bundle; dropped: not in the bundle."
    )
    return table(caption, record.candidates, columns, left=("result and reason", "backend"))


def _interval(known: Figure | None, decimals: int, form: str = " ({})") -> str | None:
    """Return a figure with its interval, if the interval has a width."""
    if known is None:
        return None
    value, low, high = (f"{x:.{decimals}f}" for x in (known.value, known.low, known.high))
    return value + (form.format(f"{low} to {high}") if known.low != known.high else "")


def _cell(known: Figure | None, decimals: int) -> str | None:
    return _interval(known, decimals, "<small>{}</small>")
