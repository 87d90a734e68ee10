"""`mmedge heads`: heads on the taps of encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import BundleArgument, JsonOption, PrecisionOption

if TYPE_CHECKING:
    from mmedge.models.banks import PrototypeBank

__all__ = ["heads"]

_LISTED = 8

heads = typer.Typer(no_args_is_help=True, help="Add heads to a bundle; teach labels by example.")


@heads.command()
def add(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the encoders.", show_default=False)],
    head: Annotated[Path, typer.Argument(help="Bundle of the head.", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Bundle to write, NAME.mmedge.", show_default=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Overwrite an existing bundle.")
    ] = False,
) -> None:
    """Write a bundle that holds encoders and a head on them."""
    from mmedge.bundle.joining import add_head
    from mmedge.cli.output import plain, stdout_console

    manifest = add_head(bundle, head, out, overwrite=overwrite)
    stdout_console().print(plain(f"{out} written: {', '.join(manifest.roles)}."))


@heads.command()
def teach(
    bundle: BundleArgument,
    folder: Annotated[
        Path, typer.Argument(help="Folder with a folder of images per label.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Bank to write, NAME.bank.", show_default=False)
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a folder of images per known class, some dozens each, from which it "
            "is learned how much one thing varies.",
            show_default="the taught images",
        ),
    ] = None,
    tap: Annotated[
        str, typer.Option(help="Tap of the image encoder: embedding, patches, ...")
    ] = "embedding",
    precision: PrecisionOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Overwrite an existing bank.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Teach labels by example; print the leave-one-out accuracy and what looks wrong.

    An image that looks like another label is named. No training: the bank holds what the encoder
    makes of the images.
    """
    import mmedge
    from mmedge.cli.output import print_json
    from mmedge.errors import StorageError
    from mmedge.models.embedding import EmbeddingModel

    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists. Pass --overwrite to replace it, or choose another name.")
    taught = _images(folder)
    known = None if base is None else _images(base)
    roles = [_image_role(bundle)]
    with mmedge.load(bundle, roles=roles, precision=precision) as model:
        assert isinstance(model, EmbeddingModel)  # noqa: S101, _image_role has seen it
        bank = mmedge.PrototypeBank.create(out.stem, on=model, tap=tap, base=known)
        for label, paths in taught.items():
            bank.add(label, paths, names=[str(path.relative_to(folder)) for path in paths])
    bank.save(out)
    print_json(_report(bank)) if json else _print(bank, out)


def _image_role(bundle: Path) -> str:
    from mmedge.bundle import open_bundle
    from mmedge.bundle.kinds import EmbeddingKind
    from mmedge.errors import BundleError
    from mmedge.specs import Modality

    kind = open_bundle(bundle).manifest.kind
    role = kind.encoders.get(Modality.IMAGE) if isinstance(kind, EmbeddingKind) else None
    if role is None:
        raise BundleError(f"{bundle} has no image encoder. Labels are taught on one.")
    return role


def _images(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each subfolder, by its name."""
    from mmedge.errors import InputError
    from mmedge.preprocess.decode import IMAGE_SUFFIXES

    found: dict[str, list[Path]] = {}
    for each in sorted(folder.iterdir()) if folder.is_dir() else []:
        if each.is_dir():
            paths = sorted(p for p in each.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not paths:
                raise InputError(f"{each} holds no images. Add some, or remove the folder.")
            found[each.name] = paths
        elif each.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"{each} has no label. Move it into a folder of its label.")
    if not found:
        raise InputError(f"{folder}: expected a folder with a folder of images for each label.")
    return found


def _report(bank: PrototypeBank) -> dict[str, object]:
    low = high = value = None
    if bank.measurable:
        value, (low, high) = bank.accuracy.value, bank.accuracy.interval
    return {
        "labels": dict(bank.counts),
        "tap": bank.tap,
        "space": bank.space,
        "leave_one_out": {"value": value, "low": low, "high": high},
        "threshold": bank.threshold,
        "outliers": [
            {"frame": each.frame, "label": each.label, "nearest": each.nearest}
            for each in bank.outliers
        ],
    }


def _print(bank: PrototypeBank, out: Path) -> None:
    from mmedge.cli.output import plain, stdout_console

    console = stdout_console()
    shown = ", ".join(f"{label} ({count})" for label, count in bank.counts.items())
    console.print(plain(f"{out} written: {shown}."))
    if bank.measurable:
        console.print(f"Leave-one-out accuracy: {bank.accuracy}.")
    else:
        console.print("Leave-one-out accuracy: needs two labels and several images of one.")
    if bank.threshold <= -1:
        console.print("Note: one image a label and no --base: no image will be 'unknown'.")
    for each in bank.outliers[:_LISTED]:
        console.print(plain(f"Outlier: {each}."))
    if len(bank.outliers) > _LISTED:
        console.print(f"... and {len(bank.outliers) - _LISTED} more.")
