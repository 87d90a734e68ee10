"""`mmedge verify`: check file hashes and golden outputs of a bundle on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import BundleArgument, JsonOption

if TYPE_CHECKING:
    from mmedge.sessions.verification import RoleVerification

__all__ = ["verify"]


def verify(
    bundle: BundleArgument,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device: cpu, cuda or cuda:N; gpu is the same as cuda.",
            show_default="the best available",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision or variant.", show_default="all"),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backend that runs the graphs; `mmedge doctor` lists them.",
            show_default="the one that computed the golden outputs",
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Time limit for each variant, in seconds (0 for none).",
            show_default="$MMEDGE_TIME_LIMIT_S, or 300",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check every file's hash, then replay the golden vectors on this machine.

    Exits with 1 if a file is changed, missing or unknown, or if an output differs from the golden
    one by more than the bundle allows.
    """
    from mmedge.bundle import open_bundle, verify_files
    from mmedge.cli.output import print_json
    from mmedge.sessions.verification import verify_bundle

    opened = open_bundle(bundle)
    verify_files(opened)
    results = verify_bundle(
        opened, device=device, precision=precision, backend=backend, time_limit_s=time_limit
    )
    passed = all(result.passed for result in results)
    if json:
        print_json(
            {
                "path": str(bundle),
                "files": len(opened.manifest.files),
                "passed": passed,
                "roles": [_document(result) for result in results],
            }
        )
    else:
        _print(len(opened.manifest.files), results)
    if not passed:
        _explain(bundle, results)
        raise typer.Exit(1)


def _document(result: RoleVerification) -> dict[str, object]:
    placement = result.placement
    return {
        "role": result.role,
        "variant": result.variant,
        "passed": result.passed,
        "samples": result.samples,
        "cosine_min": result.cosine_min,
        "max_abs_error": result.max_abs_error,
        "tolerance": result.tolerance.model_dump(mode="json"),
        "placement": {
            **asdict(placement),
            "providers": dict(placement.providers),
            "exceptions": dict(placement.exceptions),
        },
    }


def _print(files: int, results: list[RoleVerification]) -> None:
    from rich.text import Text

    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import role_rows, table

    console = stdout_console()
    console.print(f"{files} files, every size and sha256 as in the manifest.")
    places = {f"{result.placement.engine} on {result.placement.device}" for result in results}
    console.print(f"Golden vectors replayed with {', '.join(sorted(places))}:")
    numbers = ("cosine min", "allowed", "max error", "allowed ", "n")
    rows: dict[str, list[tuple[str | Text, ...]]] = {}
    for result in results:
        cells = (
            result.variant,
            f"{result.cosine_min:.7f}",
            f"{result.tolerance.cosine_min:.7g}",
            f"{result.max_abs_error:.1e}",
            f"{result.tolerance.max_abs_error:.1e}",
            str(result.samples),
            Text("ok", "green") if result.passed else Text("OUT OF TOLERANCE", "bold red"),
        )
        rows.setdefault(result.role, []).append(cells)
    console.print(table("variant", *numbers, "result", numbers=numbers, rows=role_rows(rows)))


def _explain(bundle: Path, results: list[RoleVerification]) -> None:
    from mmedge.cli.output import print_error

    failed = [f"{result.role}/{result.variant}" for result in results if not result.passed]
    print_error(
        f"{bundle}: out of tolerance here: {', '.join(failed)}. The files are intact, so this "
        "machine computes differently: do not use these variants here; try another --device or "
        "precision, or another version of the engine."
    )
