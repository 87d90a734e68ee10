"""`mmedge convert`: from a PyTorch model to a bundle. Runs on a workstation."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmedge.cli.options import JsonOption
from mmedge.errors import BackendUnavailableError

if TYPE_CHECKING:
    from mmedge.bundle.tuning import Objective
    from mmedge.cli.progress import Steps
    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.progress import ProgressEvent
    from mmedge.converters.report import ConversionReport, VariantReport

__all__ = ["convert"]

# What the extras [convert,cpu] bring that the device's install may lack.
_NEEDED = (
    *("torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript", "safetensors"),
    "onnxruntime",
)
_MAX_LISTED = 10
_LADDER = "fp32,int8"


def convert(  # noqa: PLR0913, PLR0917, one parameter an option
    source: Annotated[
        str,
        typer.Argument(help="A folder in transformers' format, or a hub id.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The bundle, NAME.mmedge.", show_default=False)
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto to search, or methods, several with commas: fp32, fp16, bf16, fp8, int8, "
            "int8-dynamic, int8-static, int8-weight, int4. Most take settings: "
            "int8-static-mse-equalized, int4-g64-gptq. ROLE:METHOD is for one role: "
            "fp32,image_encoder:int8-static,text_encoder:fp16. See docs/quantization.md.",
            show_default="auto with --max-drop, --metric or --objective, else fp32,int8",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Pictures like the device's (captions.jsonl for texts), for ranges and all else "
            "that is read off the data: a folder or a .jsonl file."
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Held-out pictures with captions or labels, none of them in --calibration: a "
            "folder or a .jsonl file."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="For auto: how much of the metric may be lost, 0 to 1.", show_default="0.01"
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="For auto: recall@1, recall@5, recall@10, zero-shot, cosine-mean, cosine-p1, "
            "cosine-min, top-k, rank-correlation or interchangeability. Without it, what the data "
            "tells: recall@1, else zero-shot, else cosine-p1."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="For auto: what to make small: latency, size or energy.", show_default="latency"
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Measure what quantizing each layer alone does."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write what was tried and what became of each layer.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="What the graphs are made for: cpu, or tensorrt for engines.")
    ] = "cpu",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub repository.")
    ] = None,
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Merge the LoRA adapter beside the weights.")
    ] = False,
    template: Annotated[
        str, typer.Option(help="Text of a label for zero-shot accuracy, {} standing for it.")
    ] = "a photo of a {}",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle that stands there.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unreadable pictures out.")
    ] = False,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Convert a model to a bundle: export, quantize, check against PyTorch, describe."""
    _require_extra()
    from mmedge.cli.output import print_json
    from mmedge.converters.config import AUTO, ConvertConfig, refuse_of_search

    of_search = {"--max-drop": max_drop, "--metric": metric, "--objective": objective}
    given = [option for option, value in of_search.items() if value is not None]
    if precision is None:
        precision = AUTO if given else _LADDER
    precisions = tuple(name.strip() for name in precision.split(",") if name.strip())
    if AUTO not in precisions:
        refuse_of_search(given, precisions)
    config = ConvertConfig(
        source=source,
        out=out,
        precisions=precisions,
        revision=revision,
        merge_adapter=merge_adapter,
        calibration=calibration,
        evaluate=evaluate,
        targets=tuple(target.split(",")),
        template=template,
        overwrite=overwrite,
        skip_bad=skip_bad,
        seed=seed,
        explain=explain,
        max_drop=ConvertConfig.max_drop if max_drop is None else max_drop,
        metric=metric,
        objective=ConvertConfig.objective if objective is None else cast("Objective", objective),
    )
    if html is not None:
        _check_html(html, config)
    from mmedge.converters.request import check_request

    check_request(config)
    from mmedge.converters.pipeline import convert as run  # torch comes along

    if quiet or json:
        report = run(config)
    else:
        from mmedge.cli.progress import Steps

        with Steps() as steps:
            report = run(config, partial(_show, steps))
    if html is not None:
        from mmedge.bundle import open_bundle
        from mmedge.files import write_atomic
        from mmedge.reports.tuning import render_bundle

        write_atomic(html, render_bundle(open_bundle(out)).encode())
    if json:
        print_json(report.to_json())
    elif not quiet:
        _print(report)


def _show(steps: Steps, event: ProgressEvent) -> None:
    if event.total > 1:
        steps.part(event.stage, event.done, event.total)
    else:
        steps.step(event.stage)


def _check_html(html: Path, config: ConvertConfig) -> None:
    """Refuse a page that could not be written after minutes of work, or would be empty."""
    from mmedge.converters.config import recipes
    from mmedge.errors import ConversionError, StorageError

    if not config.searches and all(recipe.variant == "fp32" for recipe in recipes(config)):
        raise ConversionError(
            "--html shows what a search tried and what became of each layer; of fp32 alone there "
            "is neither. Leave it out, or name other precisions."
        )
    if html.is_dir() or not html.absolute().parent.is_dir():
        raise StorageError(f"Cannot write {html}: give a file in a folder that is there.")


def _require_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"mmedge convert needs {', '.join(missing)}, which the device's install leaves out. "
            'Install them with: pip install "mmedge[convert,cpu]"'
        )


def _print(report: ConversionReport) -> None:
    from mmedge.cli.output import new_table, plain, stdout_console
    from mmedge.cli.quality_tables import quality_tables
    from mmedge.cli.search_tables import search_tables

    console = stdout_console()
    numbers = ("size", "parity", "max error", "time s")
    table = new_table("role", "variant", *numbers, numbers=numbers)
    for line in report.variants:
        table.add_row(line.role, line.variant, *_cells(line))
    console.print(table)
    console.print("parity: smallest cosine with PyTorch, over random inputs")
    if searched := search_tables(report.searched):
        console.print(searched)
    for role in dict.fromkeys(line.role for line in report.variants):
        qualities = {v.variant: v.quality for v in report.variants if v.role == role and v.quality}
        for figures in quality_tables(role, qualities, console.width, every=False):
            console.print(figures)
        for about in dict.fromkeys(quality.data for quality in qualities.values()):
            console.print(f"on {plain(about)}")
    for note in report.notes:
        console.print(f"Note: {plain(note)}")
    for message in report.skipped[:_MAX_LISTED]:
        console.print(f"Skipped: {plain(message)}")
    if len(report.skipped) > _MAX_LISTED:
        console.print(f"... and {len(report.skipped) - _MAX_LISTED} more.")
    console.print(f"{plain(str(report.path))} written in {report.duration_s:.0f} s.")


def _cells(line: VariantReport) -> list[str]:
    from mmedge.cli.output import human_bytes

    parity = line.parity
    cells = [human_bytes(line.size_bytes)]
    cells += [f"{parity.cosine_min:.6f}", f"{parity.max_abs_error:.1e}"] if parity else ["-", "-"]
    return [*cells, f"{line.duration_s:.1f}"]
