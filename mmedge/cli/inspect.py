"""`mmedge inspect`: show the contents of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmedge.cli.options import BundleArgument, JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from mmedge.bundle import Bundle, Manifest, NodeEntry, NodeTable, Variant
    from mmedge.preprocess.config import ProcessorConfig
    from mmedge.preprocess.steps import ImageStep

__all__ = ["inspect"]

_SHORT_HASH = 12
_NONE = "-"
_MOST_NAMED = 3


def inspect(
    bundle: BundleArgument,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Show format, errors and reason for each node.")
    ] = False,
    role: Annotated[
        str | None, typer.Option(help="With --nodes: role.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="With --nodes: variant.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML report of the search and of the nodes.",
            show_default="no",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a bundle: roles, variants, quality, search, preprocessing, provenance."""
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_json

    if (role is not None or variant is not None) and not nodes:
        raise typer.BadParameter("--role and --variant select node tables: add --nodes.")
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

    from mmedge.cli.output import print_json, stdout_console
    from mmedge.cli.tables import Entry, entry_lines, folded, print_part

    tables = _node_tables(bundle, role, variant)
    if as_json:
        document = [table.model_dump(mode="json") for table in tables]
        print_json({"path": str(bundle.path), "nodes": document})
        return
    console = stdout_console()
    heads = ("op", "shape", "format", "input range", "w error", "o error")
    for table in tables:
        entries = [
            Entry(name, tuple(_figures(node)), node.reason, group)
            for node in table.nodes
            for group, name in [node.place]
        ]
        lines = [
            Text(line, style=style)
            for line, style in entry_lines(
                "node", heads, entries, console.width, numbers=("w error", "o error")
            )
        ]
        summary = (line for text in _summary(table) for line in folded(text, console.width))
        shown = Text("\n").join([*lines, Text(""), *map(Text, summary)])
        print_part(f"{table.role}/{table.variant}", shown, console)


def _node_tables(bundle: Bundle, role: str | None, variant: str | None) -> list[NodeTable]:
    """Return the node tables of the selected roles and variants; None selects all.

    Raises:
        InputError: If there is no such role or variant, or none of them has a node table.
        ManifestError, IntegrityError: If a table cannot be used.
    """
    from mmedge.errors import InputError

    roles = [role] if role is not None else list(bundle.manifest.roles)
    if role is not None and variant is not None:
        chosen = [bundle.variant(role, variant)]
    else:
        chosen = [
            entry
            for name in roles
            for entry in bundle.role(name).variants
            if variant is None or variant in (entry.name, entry.precision.value)
        ]
    if variant is not None and not chosen:
        raise InputError(bundle.no_variant(variant, roles))
    tables = [table for entry in chosen if (table := bundle.nodes(entry)) is not None]
    if not tables:
        names = ", ".join(dict.fromkeys(entry.name for entry in chosen))
        raise InputError(
            f"{bundle.path} has no node table of {names}. Convert again with "
            "'mmedge convert --explain'; fp32 has none, since it is all float."
        )
    return tables


def _figures(node: NodeEntry) -> Iterator[str]:
    from mmedge.cli.tables import ABSENT

    yield node.op_type
    yield f"{node.shape[0]}x{node.shape[1]}"
    yield node.precision
    unknown = node.low is None or node.high is None
    yield ABSENT if unknown else f"{node.low:.3g}..{node.high:.3g}"
    for error in (node.weight_error, node.output_error):
        yield ABSENT if error is None else f"{error:.1e}"


def _summary(table: NodeTable) -> Iterator[str]:
    from collections import Counter

    counts = Counter(node.precision for node in table.nodes)
    yield f"{len(table.nodes)} nodes: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    measured = [(-n.output_error, n.name) for n in table.nodes if n.output_error is not None]
    worst = [name for _, name in sorted(measured)[:_MOST_NAMED]]
    if worst:
        yield f"most sensitive: {', '.join(worst)}"
        yield (
            "w error: relative error of the weight. o error: 1 - mean cosine of the output with "
            f"only this node quantized, on {table.samples} calibration samples."
        )


def _size_bytes(bundle: Bundle) -> int:
    return sum(entry.size_bytes for entry in bundle.manifest.files.values())


def _print(bundle: Bundle) -> None:
    from rich.text import Text

    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import facts, print_part, search_lines

    console = stdout_console()
    manifest = bundle.manifest
    console.print(facts(_overview(bundle)))
    for title, part in (
        ("Roles", facts(_roles(manifest))),
        ("Variants, highest fidelity first", _variants(manifest)),
        ("Recipes by layout", facts(_recipes(manifest))),
        ("Parity with the source model", _parity(manifest)),
        *_quality(manifest, console.width),
        ("Embedding spaces: variants whose vectors can share an index", facts(_spaces(manifest))),
        ("Preprocessing", facts(_preprocessing(manifest))),
        ("Provenance", facts(_provenance(manifest))),
    ):
        if part.row_count:
            print_part(title, part, console)
    for name, role in manifest.roles.items():
        if role.search is not None:
            lines = search_lines(role.search, console.width)
            shown = Text("\n").join(Text(line, style=style) for line, style in lines)
            print_part(f"Search: {name}", shown, console)


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


def _variants(manifest: Manifest) -> Table:
    from mmedge.cli.output import human_bytes
    from mmedge.cli.tables import role_rows, table

    rows = {
        name: [
            (each.name, each.precision.value, human_bytes(each.size_bytes), str(each.opset))
            for each in role.variants
        ]
        for name, role in manifest.roles.items()
    }
    numbers = ("size", "opset")
    return table("variant", "precision", *numbers, numbers=numbers, rows=role_rows(rows))


def _recipes(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the recipe of each variant, once if several roles share it."""
    alike: dict[str, dict[str, list[str]]] = {}
    for role, variant in _all_variants(manifest):
        made = f"{', '.join(variant.models)}: {_settings(variant.recipe) or _NONE}"
        alike.setdefault(variant.name, {}).setdefault(made, []).append(role)
    for name, recipes in alike.items():
        for made, roles in recipes.items():
            yield name if len(recipes) == 1 else f"{', '.join(roles)}/{name}", made


def _settings(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as text: settings that are on, without those off or empty."""
    parts = []
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
        parts.append(name if shown is True else f"{name} {shown}")
    return ", ".join(parts)


def _parity(manifest: Manifest) -> Table:
    from mmedge.cli.tables import role_rows, table

    rows = {
        name: [
            (
                variant.name,
                f"{parity.max_abs_error:.1e}",
                f"{parity.cosine_mean:.6f}",
                f"{parity.cosine_min:.6f}",
                str(parity.samples),
            )
            for variant in role.variants
            if (parity := variant.parity) is not None
        ]
        for name, role in manifest.roles.items()
    }
    numbers = ("max error", "cosine mean", "cosine min", "n")
    return table("variant", *numbers, numbers=numbers, rows=role_rows(rows))


def _quality(manifest: Manifest, width: int) -> Iterator[tuple[str, Table]]:
    from mmedge.cli.tables import quality_tables

    for name, role in manifest.roles.items():
        qualities = {v.name: v.quality for v in role.variants if v.quality is not None}
        about = dict.fromkeys(f"{q.data} (n = {q.samples})" for q in qualities.values())
        for table in quality_tables(name, qualities, width):
            yield f"Quality with 95 % intervals, measured on {', '.join(about)}", table


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
        if config.cleaning is not None:
            yield f"cleaned: {config.cleaning}"
        yield config.tokenizer_file
        yield f"at most {config.max_length} tokens"
        to = "the longest" if config.padding == "longest" else str(config.max_length)
        yield f"padded to {to} with id {config.pad_id}"
    else:
        shown = config.model_dump(mode="json", exclude={"type", "input"}, exclude_none=True)
        yield from (f"{key} {value}" for key, value in shown.items())


def _step(step: ImageStep) -> str:
    from mmedge.preprocess.steps import Crop, Decode, Pad, Patches, Rescale, Resize

    if isinstance(step, Decode):
        return "alpha on white" if step.alpha == "white" else "alpha dropped"
    if isinstance(step, Pad):
        return "pad to a square"
    if isinstance(step, Patches):
        return f"at most {step.count} patches of {step.size} x {step.size} ({step.resample})"
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
