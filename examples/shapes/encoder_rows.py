"""Figures of a model in fp32 and in int8, taken from its bundle; and of a CLIP's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from drawing import render
from generate import captioned, write_folder
from inject_outliers import convert_folder
from metrics import recall_at_k

import mmedge
from mmedge.converters import ConversionReport, ConvertConfig, convert

SHAPES = Path(__file__).parent
LARGEST_LOSS = 0.01
"""Largest loss of a figure to int8, and the accuracy budget of the conversions."""
CALIBRATION, JUDGED = 192, 128
SIZE = 224


@dataclass(frozen=True)
class Row:
    """One figure of a model, on unseen scenes.

    Attributes:
        model: Folder of the source.
        figure: Such as "map".
        variant: The int8 variant.
        count: Number of scenes.
        fp32: The figure in fp32.
        int8: In the int8 variant.
        goal: Smallest figure in both; None where nothing is asked of it.
        control: A negative control, which must lose more than ``LARGEST_LOSS`` ...
        caught: ... and whose conversion must find that on data of its own.
    """

    model: str
    figure: str
    variant: str
    count: int
    fp32: float
    int8: float
    goal: float | None = None
    control: bool = False
    caught: bool = False

    @property
    def loss(self) -> float:
        """What int8 loses."""
        return self.fp32 - self.int8

    @property
    def passed(self) -> bool | None:
        """Whether the row shows what it must; None where nothing is asked of it."""
        if self.goal is None:
            return None
        if self.control:
            return self.fp32 >= self.goal and self.loss > LARGEST_LOSS and self.caught
        return min(self.fp32, self.int8) >= self.goal and self.loss <= LARGEST_LOSS

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        figures = {"fp32": self.fp32, "int8": self.int8, "loss": self.loss}
        return {
            "model": self.model,
            "figure": self.figure,
            "variant": self.variant,
            "count": self.count,
            **{name: round(value, 4) for name, value in figures.items()},
            "goal": self.goal,
            "control": self.control,
            "caught": self.caught,
            "passed": self.passed,
        }


def convert_source(
    source: Path, work: Path, precisions: Sequence[str], data: tuple[Path, Path]
) -> ConversionReport:
    """Convert a model to fp32 and more.

    Args:
        source: Folder of the model.
        work: Where the bundle is written, under the folder's name.
        precisions: In addition to fp32.
        data: Samples for calibration, and others that the conversion judges its variants by.
    """
    out = work / f"{source.name}.mmedge"
    config = ConvertConfig(
        str(source),
        out,
        ("fp32", *precisions),
        calibration=data[0],
        evaluate=data[1],
        template="a {}",
    )
    return convert(config)


def calibration_scenes(work: Path, name: str) -> tuple[Path, Path]:
    """Write scenes of the calibration split for ``convert_source``.

    Args:
        work: Where the scenes are written.
        name: "captions.jsonl" for captions, "annotations.json" for boxes.
    """
    first, second = work / "calibration", work / "judged"
    write_folder(captioned("calibration", CALIBRATION, seed=0), first, SIZE)
    write_folder(captioned("calibration", JUDGED, seed=1), second, SIZE)
    return first / name, second / name


def write_outliers(source: Path, work: Path) -> Path:
    """Write a trained model with outliers in its activations, of the same function in fp32."""
    folder = work / f"{source.name}-outliers"
    convert_folder(source, folder, channels=4, factor=64.0, seed=0)
    return folder


def caught(report: ConversionReport, variant: str) -> bool:
    """Return whether a conversion found a variant's loss, and did not make it the default there."""
    bad = {
        line.role
        for line in report.variants
        if line.variant == variant and line.quality is not None
        for drop in line.quality.drops.values()
        if drop.value > LARGEST_LOSS
    }
    return bool(bad) and all(report.defaults[role].variant != variant for role in bad)


def clip_rows(seed: int, count: int, work: Path) -> list[Row]:
    """Return recall@1, text to image, of the trained CLIP and of its copy with outliers."""
    pairs = captioned("test", count, seed)
    images = [np.asarray(render(scene, SIZE)) for scene, _ in pairs]
    texts = [text for _, text in pairs]

    def recall(bundle: Path, precision: str) -> float:
        with mmedge.DualEncoder.load(bundle, precision=precision) as clip:
            embedded = clip.encode_image(images, batch_size=1)
            return recall_at_k(clip.encode_text(texts, batch_size=1), embedded, 1)

    rows, data = [], calibration_scenes(work, "captions.jsonl")
    for name, control in (("clip", False), ("clip-outliers", True)):
        report = convert_source(SHAPES / name, work, ["int8-static"], data)
        fp32, int8 = (recall(report.path, each) for each in ("fp32", "int8-static"))
        found = control and caught(report, "int8-static")
        rows.append(Row(name, "recall@1", "int8-static", count, fp32, int8, 0.9, control, found))
    return rows
