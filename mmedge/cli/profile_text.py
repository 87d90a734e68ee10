"""A profile as text that fits 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmedge.cli.output import plain
from mmedge.profiling.result import Cell, Profile
from mmedge.profiling.statistics import PERCENTILES
from mmedge.reports.charts import number

__all__ = ["print_profile"]

_ABSENT = "-"


def print_profile(profile: Profile, console: Console) -> None:
    """Print a profile.

    Args:
        profile: What was measured.
        console: Where to; nothing is wider than 80 columns if the names are not.
    """
    console.print(_head(profile))
    for role in dict.fromkeys(cell.role for cell in profile.cells):
        cells = [cell for cell in profile.cells if cell.role == role]
        console.print(_latency_table(role, cells))
        if any(cell.baseline for cell in cells):
            console.print(_baseline_table(role, cells))
    console.print(_variant_table(profile))
    if profile.stages:
        console.print(_stage_table(profile))
    console.print(_tail(profile))


def _head(profile: Profile) -> RenderableType:
    machine, config = profile.machine, profile.config
    load = machine.load_average_before
    engine = profile.cells[0].placement.engine
    return Group(
        Text(plain(f"{profile.bundle.name}: {profile.bundle.path}"), style="bold"),
        Text(
            f"{machine.cpu_model}, {len(machine.processors_allowed)} of "
            f"{machine.processors_online} processors, load "
            f"{f'{load[0]:.2f}' if load else 'unknown'}; {engine} on {config.device}"
        ),
        Text(
            "Milliseconds a run; a percentile is shown where the sample supports it; ~ noisy",
            style="dim",
        ),
    )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(
        title=Text(plain(title), style="bold"),
        title_justify="left",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(name: str, *, noisy: bool = False) -> Text:
    return Text(plain(name) + (" ~" if noisy else ""))


def _latency_table(role: str, cells: Sequence[Cell]) -> RenderableType:
    tokens = any(cell.sequence is not None for cell in cells)
    names = [f"p{percent}" for percent in PERCENTILES]
    shape = ["batch", "thr", *(["tok"] if tokens else [])]
    table = _table(f"\n{role}", ["variant"], [*shape, "n", *names, "per s"])
    for cell in cells:
        percentiles = cell.latency.percentiles
        table.add_row(
            _name(cell.variant, noisy=bool(cell.noise)),
            str(cell.batch),
            str(cell.threads),
            *([str(cell.sequence)] if tokens else []),
            str(cell.latency.n),
            *(number(percentiles[p].value_ms) if p in percentiles else _ABSENT for p in names),
            number(cell.throughput_per_s),
        )
    return table


def _baseline_table(role: str, cells: Sequence[Cell]) -> RenderableType:
    table = _table(
        f"\n{role}, time relative to the baseline (below 1 is faster)",
        ["variant", "baseline"],
        ["batch", "thr", "tok", "pairs", "ratio", "95 % interval"],
    )
    for cell in cells:
        if cell.baseline is None:
            continue
        ratio = cell.baseline.ratio
        table.add_row(
            _name(cell.variant),
            _name(cell.baseline.name),
            str(cell.batch),
            str(cell.threads),
            _ABSENT if cell.sequence is None else str(cell.sequence),
            str(ratio.pairs),
            f"{ratio.median:.3f}",
            f"{ratio.low:.3f} to {ratio.high:.3f}",
        )
    return table


def _variant_table(profile: Profile) -> RenderableType:
    table = _table(
        "\nSize (MB), cold start, its CPU time and load (ms), memory (MB), cosine with fp32",
        ["role", "variant"],
        ["size", "cold", "CPU", "load", "peak", "steady", "cosine"],
    )
    for item in profile.variants:
        cold, memory = item.cold_start, item.memory
        table.add_row(
            _name(item.role),
            _name(item.variant),
            number(item.size_bytes / 1e6),
            number(cold.first_embedding_ms.median) if cold else _ABSENT,
            number(cold.cpu_ms.median) if cold else _ABSENT,
            number(cold.load_ms.median) if cold else _ABSENT,
            number(memory.peak_bytes / 1e6) if memory else _ABSENT,
            number(memory.steady_bytes / 1e6) if memory else _ABSENT,
            _ABSENT if item.cosine_mean is None else f"{item.cosine_mean:.5f}",
        )
    return table


def _stage_table(profile: Profile) -> RenderableType:
    table = _table(
        "\nEnd to end at batch 1, medians (ms): where the time goes", ["call"], ["ms", "share"]
    )
    for item in profile.stages:
        whole = item.sum_ms + item.stages_ms["other"]
        table.add_row(
            _name(f"{item.role} {item.variant}, {item.input}", noisy=bool(item.noise)),
            number(whole),
            "",
        )
        for stage, value in item.stages_ms.items():
            table.add_row(f"  {stage}", number(value), f"{value / whole:.0%}" if whole else _ABSENT)
    return table


def _tail(profile: Profile) -> RenderableType:
    lines: list[Text] = []
    placements = {f"{cell.role}.{cell.variant}": cell.placement for cell in profile.cells}
    lines.append(Text("\nPlacement", style="bold"))
    lines += (Text(plain(f"{name}: {p.summary}")) for name, p in placements.items())
    if profile.warnings:
        lines.append(Text("\nTake with care", style="bold yellow"))
        lines += (Text(plain(f"- {warning}")) for warning in profile.warnings)
    if profile.gates:
        lines.append(Text("\nGates", style="bold"))
    for gate in profile.gates:
        lines.append(
            Text.assemble(
                ("FAILED" if gate.failed else "ok    ", "bold red" if gate.failed else "green"),
                f" {plain(gate.metric)}: got {number(gate.got)}, "
                f"must not be {gate.op} {gate.limit:g}",
            )
        )
    return Group(*lines)
