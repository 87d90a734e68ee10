"""`mmedge convert`: convert a model to a bundle, on a workstation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmedge.cli.options import JsonOption
from mmedge.errors import BackendUnavailableError

if TYPE_CHECKING:
    from rich.table import Table

    from mmedge.bundle.quality import Figure
    from mmedge.bundle.tuning import Objective
    from mmedge.cli.progress import Steps
    from mmedge.converters.config import ConvertConfig, JpegDraft
    from mmedge.converters.progress import Progress, ProgressEvent
    from mmedge.converters.report import ConversionReport

__all__ = ["convert", "verdict_line"]

# Packages of the extras [convert,cpu] that a device's install may lack.
_NEEDED = (
    *("torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript", "safetensors"),
    "onnxruntime",
)
_MAX_LISTED = 10
_NOISY = 1.5
_LADDER = "fp32,int8"


def convert(  # noqa: PLR0913, PLR0917, one parameter an option
    source: Annotated[
        str,
        typer.Argument(
            help="Model: a folder of transformers or open_clip, a hub id or an ONNX file; or a "
            "folder with a head (head.json).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Bundle to write, NAME.mmedge.", show_default=False)
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions, a,b,c, or auto to search: fp32, fp16, bf16, fp8, int8, "
            "int8-dynamic, int8-static, int8-weight, int4. Most take settings, as in "
            "int8-static-mse-equalized or int4-g64-gptq. ROLE:METHOD applies to one role, as in "
            "fp32,image_encoder:int8-static,text_encoder:fp16. See docs/quantization.md.",
            show_default="auto with --max-drop, --metric or --objective, else fp32,int8; small "
            "heads fp32",
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            help="Variant or precision to load by default; [ROLE:]NAME, a,b,c.",
            show_default="the fastest within the accuracy budget",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration data: a folder or a .jsonl file of samples like those seen on the "
            "device."
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Evaluation data with captions, labels or boxes, disjoint from --calibration: a "
            "folder, a .jsonl file or a COCO file."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="For auto: accuracy budget, the largest loss of the metric, 0 to 1.",
            show_default="0.01",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="For auto: metric of the budget: recall@1, recall@5, recall@10, zero-shot, "
            "index-recall, cosine-mean, cosine-p1, cosine-min, top-k, rank-correlation or "
            "interchangeability; of classifiers also accuracy or class-agreement.",
            show_default="recall@1 with captions, zero-shot or accuracy with labels, else "
            "class-agreement of classifiers or cosine-p1",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="For auto: what to minimise: latency, size or energy.", show_default="latency"
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Measure the error of quantizing each layer alone."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML report of the search and of each layer.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Targets of the graphs: cpu, tensorrt or cpu,tensorrt.")
    ] = "cpu",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub repository.")
    ] = None,
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Merge the LoRA adapter beside the weights.")
    ] = False,
    template: Annotated[
        str, typer.Option(help="Prompt template for zero-shot accuracy; {} is the label.")
    ] = "a photo of a {}",
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Overwrite an existing bundle.")
    ] = False,
    jpeg_draft: Annotated[
        str,
        typer.Option(
            help="Decode large JPEG files at 1/2, 1/4 or 1/8 of their size: off, or auto, if the "
            "loss on JPEG files of --evaluate or --calibration is within the accuracy budget."
        ),
    ] = "off",
    on: Annotated[
        list[Path] | None,
        typer.Option(
            help="For a head: bundle of the encoder that it reads; several for several encoders.",
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="For a head: one graph of the encoder and the head.")
    ] = False,
    taps: Annotated[
        str,
        typer.Option(
            help="Hidden states that heads read, a,b,c: patches, tokens (before the last block), "
            "patches@2 (behind the second).",
            show_default="none",
        ),
    ] = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip unreadable samples.")] = False,
    json: JsonOption = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print every metric and the search.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Convert a model to a bundle: export, quantize, compare with the source model."""
    _require_extra()
    from mmedge.cli.output import print_json
    from mmedge.converters.config import AUTO, ConvertConfig, reject_search_options

    of_search = {"--max-drop": max_drop, "--metric": metric, "--objective": objective}
    given = [option for option, value in of_search.items() if value is not None]
    if precision is None:
        plain = bool(on) and not _is_large_head(source)
        precision = AUTO if given else "fp32" if plain else _LADDER
    precisions = tuple(name.strip() for name in precision.split(",") if name.strip())
    if AUTO not in precisions:
        reject_search_options(given, precisions)
    config = ConvertConfig(
        source=source,
        out=out,
        precisions=precisions,
        revision=revision,
        merge_adapter=merge_adapter,
        calibration=calibration,
        evaluate=evaluate,
        targets=tuple(name.strip() for name in target.split(",")),
        default=default,
        template=template,
        overwrite=overwrite,
        skip_bad=skip_bad,
        seed=seed,
        explain=explain,
        max_drop=ConvertConfig.max_drop if max_drop is None else max_drop,
        metric=metric,
        objective=ConvertConfig.objective if objective is None else cast("Objective", objective),
        jpeg_draft=cast("JpegDraft", jpeg_draft),
        taps=tuple(name.strip() for name in taps.split(",") if name.strip()),
    )
    if html is not None:
        _check_html(html, config)
    run = _head_conversion(config, on or (), fuse=fuse)
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
        _print(report, verbose=verbose)


def _is_large_head(source: str) -> bool:
    from mmedge.converters.head_folders import is_large

    return is_large(source)


def _head_conversion(
    config: ConvertConfig, on: Sequence[Path], *, fuse: bool
) -> Callable[..., ConversionReport]:
    """Return the function that converts a source: a model, or a head on encoders."""
    from mmedge.converters.config import check_head_options
    from mmedge.converters.request import convert as run

    if not check_head_options(config, on, fuse=fuse):
        return run
    from mmedge.converters.head_folders import convert_head_folder

    def convert_head(config: ConvertConfig, progress: Progress | None = None) -> ConversionReport:
        return convert_head_folder(config, on, fuse=fuse, progress=progress)

    return convert_head


def _show(steps: Steps, event: ProgressEvent) -> None:
    if event.total > 1:
        steps.part(event.stage, event.done, event.total)
    else:
        steps.step(event.stage)


def _check_html(html: Path, config: ConvertConfig) -> None:
    """Reject a report that cannot be written or would be empty, before the work."""
    from mmedge.converters.config import recipes
    from mmedge.errors import ConversionError, StorageError

    if not config.searches and all(recipe.variant == "fp32" for recipe in recipes(config)):
        raise ConversionError(
            "--html reports a search and quantized layers; fp32 alone has neither. Leave --html "
            "out, or name other precisions."
        )
    if html.is_dir() or not html.absolute().parent.is_dir():
        raise StorageError(f"Cannot write {html}: name a file in an existing folder.")


def _require_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"mmedge convert needs {', '.join(missing)}, not installed here. "
            'Install them with: pip install "mmedge[convert,cpu]"'
        )


def verdict_line(report: ConversionReport) -> str:
    """Return the default variants with size, speed and loss against fp32.

    Args:
        report: Of a conversion.
    """
    from mmedge.cli.output import human_bytes
    from mmedge.cli.tables import figure_cell

    parts = []
    for role, default in report.defaults.items():
        size = human_bytes(default.size_bytes)
        if default.variant == "fp32":
            parts.append(f"{role} fp32 ({size})")
            continue
        facts = [f"{size}, fp32 {human_bytes(default.fp32_size_bytes)}"]
        if default.speed is not None:
            facts.append(_speedup(default.speed.ratio))
        over = "" if default.within else ", over the accuracy budget"
        facts.append(f"{default.metric} loss {figure_cell(default.drop)}{over}")
        parts.append(f"{role} {default.variant} ({'; '.join(facts)})")
    return f"Default: {', '.join(parts)}."


def _speedup(ratio: Figure) -> str:
    """Return how much faster than fp32; with its interval where other work disturbed the timing."""
    figure = f"{1 / ratio.value:.2f}x as fast as fp32"
    if ratio.high <= _NOISY * ratio.low:
        return figure
    return f"{figure}, but busy machine: {1 / ratio.high:.2f} to {1 / ratio.low:.2f}"


def _print(report: ConversionReport, *, verbose: bool) -> None:
    from mmedge.cli.output import plain, stdout_console

    console = stdout_console()
    console.print(_summary(report))
    data = dict.fromkeys(line.quality.data for line in report.variants if line.quality is not None)
    cosine = f" cosine: mean with fp32, on {', '.join(data)}." if data else ""
    console.print(
        "*: loaded by default. parity: smallest cosine with the source model, on random inputs."
        f"{plain(cosine)} All metrics: --verbose, or mmedge inspect."
    )
    if verbose:
        _print_details(report)
    for note in report.notes:
        console.print(f"Note: {plain(note)}")
    for message in report.skipped[:_MAX_LISTED]:
        console.print(f"Skipped: {plain(message)}")
    if len(report.skipped) > _MAX_LISTED:
        console.print(f"... and {len(report.skipped) - _MAX_LISTED} more.")
    console.print(f"{plain(str(report.path))} written in {report.duration_s:.0f} s.")
    console.print(plain(verdict_line(report)))


def _summary(report: ConversionReport) -> Table:
    """Return one row per variant, with the loss of the first task metric, if any."""
    from mmedge.cli.output import human_bytes
    from mmedge.cli.tables import ABSENT, figure_cell, figure_label, role_rows, table

    known = [line.quality for line in report.variants if line.quality is not None]
    drops = dict.fromkeys(name for quality in known for name in quality.drops)
    metric = min(drops, key=lambda name: "_to_" in name, default=None)  # mean of both directions
    loss = () if metric is None else (f"{figure_label(metric, known)} loss",)
    numbers = ("size", "parity", "cosine", "time s", *loss)
    rows: dict[str, list[tuple[str, ...]]] = {}
    for line in report.variants:
        default = report.defaults.get(line.role)
        quality, parity = line.quality, line.parity
        cosine = None if quality is None else quality.value("cosine_mean")
        cells = [
            line.variant + " *" * (default is not None and default.variant == line.variant),
            human_bytes(line.size_bytes),
            ABSENT if parity is None else f"{parity.cosine_min:.6f}",
            ABSENT if cosine is None else f"{cosine:.5f}",
            f"{line.duration_s:.1f}",
        ]
        if metric is not None:
            cells.append(figure_cell(None if quality is None else quality.drops.get(metric)))
        rows.setdefault(line.role, []).append(tuple(cells))
    return table("variant", *numbers, numbers=numbers, rows=role_rows(rows))


def _print_details(report: ConversionReport) -> None:
    """Print the search's candidates and every metric."""
    from rich.text import Text

    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import print_part, quality_tables, search_lines

    console = stdout_console()
    for name, role in report.searched.items():
        if role.search is not None:
            lines = search_lines(role.search, console.width)
            shown = Text("\n").join(Text(line, style=style) for line, style in lines)
            print_part(f"Search: {name}", shown, console)
    for role_name in dict.fromkeys(line.role for line in report.variants):
        qualities = {
            line.variant: line.quality
            for line in report.variants
            if line.role == role_name and line.quality is not None
        }
        about = ", ".join(dict.fromkeys(quality.data for quality in qualities.values()))
        for part in quality_tables(role_name, qualities, console.width):
            print_part(f"Quality with 95 % intervals, measured on {about}", part, console)
