"""`mmedge export`: plain files for trtexec and C++ nodes, or a repository for Triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmedge.bundle import Bundle
    from mmedge.exports import IoDocument, Selection
    from mmedge.exports.triton import TritonModel
    from mmedge.exports.triton_configs import Device

__all__ = ["export"]

_DEVICES: dict[str, Device] = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def export(  # noqa: PLR0913, PLR0917, one parameter an option
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.mmedge.", show_default=False)],
    engine_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write ONNX files, engines, tokenizer, raw vectors and io.json for C++ nodes.",
            show_default=False,
        ),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a model repository for Triton Inference Server.",
            show_default=False,
        ),
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="Only these roles, a,b,c.", show_default="all")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions or variants, a,b,c; one for Triton.", show_default="the default's"
        ),
    ] = None,
    engines: Annotated[
        bool | None,
        typer.Option(
            help="Take engines from the cache; with --triton, TensorRT then runs the roles.",
            show_default="with --engine-dir",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of --triton: where encoders run: auto, cpu or cuda.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export that stands there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Export a bundle for programs without mmedge: C++ nodes, trtexec, Triton."""
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_json

    if (engine_dir is None) == (triton is None):
        raise typer.BadParameter("Give one of --engine-dir DIR and --triton DIR.")
    if device not in _DEVICES:
        raise typer.BadParameter(f"--device: got {device!r}, expected auto, cpu or cuda.")
    if device != "auto" and triton is None:
        raise typer.BadParameter("--device is for --triton.")
    opened = open_bundle(bundle)
    notes: list[str] = []
    if engine_dir is not None:
        chosen = _chosen(opened, role, precision, notes, ("portable",))
        document = _export_engine_dir(
            opened, engine_dir, chosen, notes, engines=engines is not False, overwrite=overwrite
        )
        if json:
            print_json(document.model_dump(mode="json") | {"path": str(engine_dir), "notes": notes})
        elif not quiet:
            _print_folder(engine_dir, document, notes)
        return
    assert triton is not None  # noqa: S101, one of them is there
    where = _DEVICES[device]
    layouts = ("onnxruntime", "portable") if where == "cpu" else ("portable", "onnxruntime")
    chosen = _chosen(opened, role, precision, notes, ("portable",) if engines else layouts)
    models = _export_triton(
        opened, triton, chosen, notes, engines=bool(engines), device=where, overwrite=overwrite
    )
    if json:
        print_json(
            {
                "path": str(triton),
                "models": [
                    {"name": each.name, "platform": each.platform, "what": each.what}
                    for each in models
                ],
                "notes": notes,
            }
        )
    elif not quiet:
        _print_repository(triton, models, notes)


def _words(option: str, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise typer.BadParameter(f"{option}: got {text!r}, expected values with commas between.")
    return words


def _chosen(
    bundle: Bundle,
    role: str | None,
    precision: str | None,
    notes: list[str],
    layouts: tuple[str, ...],
) -> tuple[Selection, ...]:
    from typing import cast

    from mmedge.bundle.manifest import Layout
    from mmedge.exports import select

    chosen = select(
        bundle,
        roles=_words("--role", role),
        precisions=_words("--precision", precision),
        layouts=cast("tuple[Layout, ...]", layouts),
    )
    notes += [each.note for each in chosen if each.note]
    return chosen


def _export_engine_dir(
    bundle: Bundle,
    out: Path,
    chosen: tuple[Selection, ...],
    notes: list[str],
    *,
    engines: bool,
    overwrite: bool,
) -> IoDocument:
    from mmedge.exports import export_engine_folder
    from mmedge.exports.cached_engines import cached_engines
    from mmedge.exports.engine_folder import SuppliedEngine

    def source(selection: Selection) -> tuple[SuppliedEngine, ...]:
        return cached_engines(bundle, selection, told=notes.append) if engines else ()

    return export_engine_folder(bundle, out, chosen, engines=source, overwrite=overwrite)


def _export_triton(
    bundle: Bundle,
    out: Path,
    chosen: tuple[Selection, ...],
    notes: list[str],
    *,
    engines: bool,
    device: Device,
    overwrite: bool,
) -> tuple[TritonModel, ...]:
    from mmedge.errors import EngineMismatchError
    from mmedge.exports import export_triton
    from mmedge.exports.cached_engines import cached_engines

    plans = {}
    for selection in chosen if engines else ():
        found = cached_engines(bundle, selection, flavour="tensorrt", told=notes.append)
        if not found:
            raise EngineMismatchError(
                f"{selection.role}/{selection.variant.name}: no engine of TensorRT in the cache. "
                f"Build it on the machine that serves: mmedge build {bundle.path} --target "
                "tensorrt. Or leave --engines out: ONNX Runtime runs the graph."
            )
        plans[selection.role] = found[0]
        key = found[0].key
        notes.append(
            f"{selection.role}: this plan runs in TensorRT {key.version} on GPUs of compute "
            f"capability {key.compute_capability} alone; the server must have both"
        )
    return export_triton(bundle, out, chosen, engines=plans, device=device, overwrite=overwrite)


def _print_folder(out: Path, document: IoDocument, notes: list[str]) -> None:
    from rich.text import Text

    from mmedge.cli.output import human_bytes, new_table, plain, stdout_console

    console = stdout_console()
    table = new_table("role", "variant", "file", "size", numbers=("size",))
    for graph in document.graphs:
        rows = [graph.onnx, *graph.external_data, *(engine.file for engine in graph.engines)]
        for index, path in enumerate(rows):
            table.add_row(
                plain(graph.role) if index == 0 else "",
                plain(graph.variant) if index == 0 else "",
                plain(path),
                human_bytes(document.files[path].size_bytes),
            )
    console.print(table)
    console.print("To build an engine with NVIDIA's own tool, in that folder:")
    for graph in document.graphs:
        console.print(Text(f"  {plain(graph.trtexec.build)}"), soft_wrap=True)
    _print_notes(notes)
    console.print(
        f"{plain(str(out))}: {len(document.files) + 1} files; io.json describes inputs, outputs "
        "and preprocessing."
    )


def _print_repository(out: Path, models: tuple[TritonModel, ...], notes: list[str]) -> None:
    from rich.text import Text

    from mmedge.cli.output import new_table, plain, stdout_console

    console = stdout_console()
    table = new_table("model", "runs in", "what")
    for model in models:
        table.add_row(plain(model.name), model.platform, plain(model.what))
    console.print(table)
    _print_notes(notes)
    if any(model.platform == "python" for model in models):
        console.print("The server's Python needs mmedge: pip install mmedge")
    line = f"tritonserver --model-repository={plain(str(out.absolute()))}"
    console.print(Text(line), soft_wrap=True)


def _print_notes(notes: list[str]) -> None:
    from mmedge.cli.output import plain, stdout_console

    for note in notes:
        stdout_console().print(f"Note: {plain(note)}.")
