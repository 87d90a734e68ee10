"""`mmedge inspect`: what is in a bundle, as a person wants to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmedge.cli.options import BundleArgument, JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from mmedge.bundle import Bundle, Manifest, Variant
    from mmedge.preprocess.config import ProcessorConfig
    from mmedge.preprocess.steps import ImageStep

__all__ = ["inspect"]

_SHORT_HASH = 12
_NONE = "-"


def inspect(
    bundle: BundleArgument,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Show what became of each node, and why.")
    ] = False,
    role: Annotated[
        str | None, typer.Option(help="Of --nodes: one role only.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of --nodes: one variant only.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page with what a search tried and what became of the nodes.",
            show_default="no",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what is in a bundle: roles, variants, fidelity, search, preprocessing, provenance."""
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_json

    if (role is not None or variant is not None) and not nodes:
        raise typer.BadParameter("--role and --variant choose among node tables: add --nodes.")
    opened = open_bundle(bundle)
    if html is not None:
        from mmedge.files import write_atomic
        from mmedge.reports.tuning import render_bundle

        write_atomic(html, render_bundle(opened).encode())
    if nodes:
        _print_nodes(opened, role, variant, as_json=json)
    elif json:
        print_json(
            {
                "path": str(bundle),
                "size_bytes": _size_bytes(opened),
                "manifest": opened.manifest.model_dump(mode="json"),
            }
        )
    else:
        _print(opened)


def _print_nodes(bundle: Bundle, role: str | None, variant: str | None, *, as_json: bool) -> None:
    from rich.text import Text

    from mmedge.cli.node_tables import node_lines, node_tables
    from mmedge.cli.output import plain, print_json, stdout_console

    tables = node_tables(bundle, role, variant)
    if as_json:
        document = [table.model_dump(mode="json") for table in tables]
        print_json({"path": str(bundle.path), "nodes": document})
        return
    console = stdout_console()
    for index, table in enumerate(tables):
        title = plain(f"{table.role}/{table.variant}")
        console.print(Text(f"\n{title}" if index else title, style="bold"))
        for line in node_lines(table, console.width):
            console.print(Text(line))


def _size_bytes(bundle: Bundle) -> int:
    return sum(entry.size_bytes for entry in bundle.manifest.files.values())


def _print(bundle: Bundle) -> None:
    from rich.text import Text

    from mmedge.cli.output import stdout_console
    from mmedge.cli.search_tables import search_tables

    console = stdout_console()
    manifest = bundle.manifest
    console.print(_facts(_overview(bundle)))
    searched = search_tables(manifest.roles)
    for title, part in (
        ("Roles", _facts(_roles(manifest))),
        ("Variants, highest fidelity first", _variants(manifest)),
        ("Recipes: layouts, and how they are made", _facts(_recipes(manifest))),
        ("Parity with the PyTorch original", _parity(manifest)),
        *_titled(
            "Quality on held-out data, with 95 % intervals", _quality(manifest, console.width)
        ),
        ("Embedding spaces: vectors of one space may be compared", _facts(_spaces(manifest))),
        ("Preprocessing", _facts(_preprocessing(manifest))),
        ("Provenance", _facts(_provenance(manifest))),
    ):
        if part.row_count:
            if title:
                console.print(Text(f"\n{title}", style="bold"))
            console.print(part)
    if searched:
        console.print()
        console.print(searched)


def _titled(title: str, parts: Iterable[Table]) -> Iterator[tuple[str, Table]]:
    """Yield several parts under one title."""
    for part in parts:
        yield title, part
        title = ""


def _facts(pairs: Iterator[tuple[str, str]]) -> Table:
    from rich.table import Table

    from mmedge.cli.output import plain

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for what, value in pairs:
        table.add_row(f"  {plain(what)}", plain(value))
    return table


def _overview(bundle: Bundle) -> Iterator[tuple[str, str]]:
    from mmedge.cli.output import human_bytes

    manifest = bundle.manifest
    yield "bundle", f"{manifest.name} ({bundle.path})"
    yield "family", manifest.family
    yield "tasks", ", ".join(task.value for task in manifest.tasks) or _NONE
    yield "kind", manifest.kind.type
    yield from manifest.kind.facts()
    yield "size", f"{human_bytes(_size_bytes(bundle))} in {len(manifest.files)} files"
    yield "format", manifest.format_version


def _roles(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, role in manifest.roles.items():
        inputs = ", ".join(str(entry.spec()) for entry in role.inputs)
        outputs = ", ".join(str(entry.spec()) for entry in role.outputs)
        default = "" if role.default is None else f"; default {role.default}"
        yield name, f"{inputs} -> {outputs}{default}"


def _all_variants(manifest: Manifest) -> Iterator[tuple[str, Variant]]:
    for name, role in manifest.roles.items():
        for variant in role.variants:
            yield name, variant


def _add_rows(
    table: Table, manifest: Manifest, rows_of: Callable[[Variant], Iterable[Sequence[str]]]
) -> Table:
    """Add the rows of every variant, each role's under a line with the role's name."""
    from rich.text import Text

    from mmedge.cli.output import plain

    for name, role in manifest.roles.items():
        rows = [row for variant in role.variants for row in rows_of(variant)]
        if rows:
            table.add_row(Text(name, style="bold"))
        for first, *others in rows:
            table.add_row(f"  {plain(first)}", *map(plain, others))
    return table


def _variants(manifest: Manifest) -> Table:
    from mmedge.cli.output import human_bytes, new_table

    def rows(variant: Variant) -> Iterator[Sequence[str]]:
        yield (
            variant.name,
            variant.precision.value,
            human_bytes(variant.size_bytes),
            str(variant.opset),
        )

    numbers = ("size", "opset")
    return _add_rows(new_table("variant", "precision", *numbers, numbers=numbers), manifest, rows)


def _recipes(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield how each variant is made, once where it is made alike in several roles."""
    alike: dict[str, dict[str, list[str]]] = {}
    for role, variant in _all_variants(manifest):
        made = f"{', '.join(variant.models)}: {_settings(variant.recipe) or _NONE}"
        alike.setdefault(variant.name, {}).setdefault(made, []).append(role)
    for name, recipes in alike.items():
        for made, roles in recipes.items():
            yield name if len(recipes) == 1 else f"{', '.join(roles)}/{name}", made


def _settings(recipe: Mapping[str, Any]) -> str:
    """Return a recipe in words: what is off or empty is left out, what is on is named."""
    told = []
    for key, value in recipe.items():
        if value in (None, False, "") or (isinstance(value, list | dict) and not value):
            continue
        shown = value
        if isinstance(value, dict):
            inner = _settings(value)
            shown = f"({inner})" if inner else True
        elif isinstance(value, list | tuple):
            shown = ", ".join(map(str, value))
        name = key.replace("_", " ")
        told.append(name if shown is True else f"{name} {shown}")
    return ", ".join(told)


def _parity(manifest: Manifest) -> Table:
    from mmedge.cli.output import new_table

    def rows(variant: Variant) -> Iterator[Sequence[str]]:
        parity = variant.parity
        if parity is not None:
            yield (
                variant.name,
                f"{parity.max_abs_error:.1e}",
                f"{parity.cosine_mean:.6f}",
                f"{parity.cosine_min:.6f}",
                str(parity.samples),
            )

    numbers = ("max error", "cosine mean", "cosine min", "n")
    return _add_rows(new_table("variant", *numbers, numbers=numbers), manifest, rows)


def _quality(manifest: Manifest, width: int) -> Iterator[Table]:
    from mmedge.cli.quality_tables import quality_tables

    for name, role in manifest.roles.items():
        qualities = {v.name: v.quality for v in role.variants if v.quality is not None}
        yield from quality_tables(name, qualities, width)
        about = dict.fromkeys(f"{q.data} (n = {q.samples})" for q in qualities.values())
        if about:
            yield _facts(iter([("measured on", ", ".join(about))]))


def _spaces(manifest: Manifest) -> Iterator[tuple[str, str]]:
    spaces: dict[str, list[str]] = {}
    for role, variant in _all_variants(manifest):
        if variant.space is not None:
            spaces.setdefault(variant.space, []).append(f"{role}/{variant.name}")
    for space, variants in spaces.items():
        yield space, ", ".join(variants)


def _preprocessing(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, config in manifest.processors.items():
        yield f"{name} -> {' + '.join(config.inputs)}", ", ".join(_steps(config))


def _steps(config: ProcessorConfig) -> Iterator[str]:
    from mmedge.preprocess.config import ImageConfig, TextConfig

    if isinstance(config, ImageConfig):
        yield from map(_step, config.steps)
    elif isinstance(config, TextConfig):
        if config.canonicalize:
            yield "canonicalized"
        yield config.tokenizer_file
        yield f"at most {config.max_length} tokens"
        to = "the longest" if config.padding == "longest" else str(config.max_length)
        yield f"padded to {to} with id {config.pad_id}"
    else:
        shown = config.model_dump(mode="json", exclude={"type", "input"}, exclude_none=True)
        yield from (f"{key} {value}" for key, value in shown.items())


def _step(step: ImageStep) -> str:
    from mmedge.preprocess.steps import Crop, Decode, Rescale, Resize

    if isinstance(step, Decode):
        return "alpha on white" if step.alpha == "white" else "alpha dropped"
    if isinstance(step, Resize):
        exact = f"{step.height} x {step.width}"
        size = exact if step.mode == "exact" else f"shorter edge {step.height}"
        return f"resize to {size} ({step.resample})"
    if isinstance(step, Crop):
        return f"centre crop {step.height} x {step.width}"
    if isinstance(step, Rescale):
        return f"times {step.factor:.6g}"
    return f"minus {_triple(step.mean)}, divided by {_triple(step.std)}"


def _triple(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _provenance(manifest: Manifest) -> Iterator[tuple[str, str]]:
    provenance = manifest.provenance
    revision = f" @ {provenance.revision}" if provenance.revision else ""
    yield "source", f"{provenance.source}{revision}"
    yield "weights", f"sha256 {provenance.weights_sha256[:_SHORT_HASH]}"
    calibration = provenance.calibration_sha256
    if calibration is not None:
        yield (
            "calibration",
            f"{provenance.calibration_samples} samples, sha256 {calibration[:_SHORT_HASH]}",
        )
    yield "tools", ", ".join(f"{name} {version}" for name, version in provenance.tools.items())
    yield "created", provenance.created
    yield "command", provenance.command
