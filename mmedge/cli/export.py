"""`mmedge export`: plain files for trtexec and C++ nodes, or a repository for Triton."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import check_target, words

if TYPE_CHECKING:
    from mmedge.bundle import Bundle
    from mmedge.exports import IoDocument, Selection
    from mmedge.exports.triton import TritonModel
    from mmedge.exports.triton_configs import Device

__all__ = ["export"]

_DEVICES: dict[str, Device] = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def export(  # noqa: PLR0913, PLR0917, one parameter an option
    bundle: Annotated[Path, typer.Argument(help="Bundle, NAME.mmedge.", show_default=False)],
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
    role: Annotated[str | None, typer.Option(help="Roles, a,b,c.", show_default="all")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions or variants, a,b,c; one for Triton.", show_default="the default's"
        ),
    ] = None,
    engines: Annotated[
        bool | None,
        typer.Option(
            help="Include engines from the cache; with --triton, run the roles with them.",
            show_default="with --engine-dir",
        ),
    ] = None,
    build: Annotated[
        bool,
        typer.Option("--build", help="Build missing engines; see mmedge build."),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="With --build: backend that builds; `mmedge doctor` lists them.",
            show_default="the first that is installed; Triton's own for --triton",
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="With --build: GPUs to build for, such as 8.9,12.0, or any.",
            show_default="the GPU of this machine",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="With --triton: device of the encoders: auto, cpu or cuda.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Overwrite an existing export.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Export a bundle for programs without mmedge: C++ nodes, trtexec, Triton."""
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_json
    from mmedge.exports import select
    from mmedge.exports.triton import TRITON_BACKEND, triton_layouts

    _check_usage(engine_dir, triton, engines, device, build=build)
    check_target(target)
    if not build and (target is not None or compute_capability is not None):
        raise typer.BadParameter("--target and --compute-capability are for --build.")
    if triton is not None and target not in (None, TRITON_BACKEND):
        raise typer.BadParameter(f"Triton runs engines of --target {TRITON_BACKEND} only.")
    opened = open_bundle(bundle)
    with_engines = build or (triton is None if engines is None else engines)
    where = _DEVICES[device]
    chosen = select(
        opened,
        roles=words("--role", role),
        precisions=words("--precision", precision),
        layouts=triton_layouts(where) if triton is not None and not with_engines else ("portable",),
        engines=with_engines or triton is None,
    )
    notes = [each.note for each in chosen if each.note]
    if build:
        wanted = target or (TRITON_BACKEND if triton is not None else None)
        named = words("--compute-capability", compute_capability) or ()
        _build(opened, chosen, wanted, named, quiet=quiet)
    if engine_dir is not None:
        document = _export_engine_dir(
            opened, engine_dir, chosen, notes, engines=with_engines, overwrite=overwrite
        )
        if json:
            print_json(document.model_dump(mode="json") | {"path": str(engine_dir), "notes": notes})
        elif not quiet:
            _print_folder(engine_dir, document, notes)
    elif triton is not None:
        models = _export_triton(
            opened, triton, chosen, notes, engines=with_engines, device=where, overwrite=overwrite
        )
        if json:
            listed = [asdict(model) for model in models]
            print_json({"path": str(triton), "models": listed, "notes": notes})
        elif not quiet:
            _print_repository(triton, models, notes)


def _check_usage(
    engine_dir: Path | None,
    triton: Path | None,
    engines: bool | None,
    device: str,
    *,
    build: bool,
) -> None:
    if (engine_dir is None) == (triton is None):
        raise typer.BadParameter("Give one of --engine-dir DIR and --triton DIR.")
    if device not in _DEVICES:
        raise typer.BadParameter(f"--device: got {device!r}, expected auto, cpu or cuda.")
    if device != "auto" and triton is None:
        raise typer.BadParameter("--device is for --triton.")
    if build and engines is False:
        raise typer.BadParameter("--build and --no-engines contradict each other.")


def _build(
    bundle: Bundle,
    chosen: tuple[Selection, ...],
    target: str | None,
    compute_capabilities: tuple[str, ...],
    *,
    quiet: bool,
) -> None:
    from functools import partial

    from mmedge.cli.build import begin_build
    from mmedge.cli.progress import Steps
    from mmedge.exports.cached_engines import build_engines
    from mmedge.sessions.choice import engine_backend

    with Steps(shown=not quiet) as steps:
        build_engines(
            bundle,
            chosen,
            target or engine_backend(),
            compute_capabilities=compute_capabilities,
            progress=partial(begin_build, steps),
            on_wait=steps.say,
        )


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
        return cached_engines(bundle, selection, report=notes.append) if engines else ()

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
    from mmedge.exports import export_triton
    from mmedge.exports.cached_engines import engines_for_triton

    plans = engines_for_triton(bundle, chosen, report=notes.append) if engines else {}
    return export_triton(bundle, out, chosen, engines=plans, device=device, overwrite=overwrite)


def _print_folder(out: Path, document: IoDocument, notes: list[str]) -> None:
    from rich.text import Text

    from mmedge.cli.output import human_bytes, plain, stdout_console
    from mmedge.cli.tables import table

    console = stdout_console()
    rows = []
    for graph in document.graphs:
        files = [graph.onnx, *graph.external_data, *(engine.file for engine in graph.engines)]
        for index, path in enumerate(files):
            names = ("", "") if index else (graph.role, graph.variant)
            size = human_bytes(document.files[path].size_bytes)
            rows.append((*names, PurePosixPath(path).name, size))
    console.print(table("role", "variant", "file", "size", numbers=("size",), rows=rows))
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

    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import table

    console = stdout_console()
    rows = [(model.name, model.platform, model.what) for model in models]
    console.print(table("model", "runs in", "what", rows=rows))
    _print_notes(notes)
    if any(model.platform == "python" for model in models):
        console.print("The server's Python needs mmedge: pip install mmedge")
    line = f"tritonserver --model-repository={plain(str(out.absolute()))}"
    console.print(Text(line), soft_wrap=True)


def _print_notes(notes: list[str]) -> None:
    from mmedge.cli.output import plain, stdout_console

    for note in notes:
        stdout_console().print(f"Note: {plain(note)}.")
