"""Figures of the trained detector, taken from its bundle in fp32 and in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from boxes import HELD_OUT, HELD_OUT_WORDINGS, WORDINGS
from captions import label_prompt
from drawing import pixel_box, render
from encoder_rows import (
    SHAPES,
    SIZE,
    Row,
    calibration_scenes,
    caught,
    convert_source,
    write_outliers,
)
from world import LABELS, Scene, scenes

import mmedge
from mmedge.converters.evaluation.average_precision import Boxes, match_boxes, mean_precision

DETECTOR = SHAPES / "detector"
GOAL = 0.8
BAD, REMEDY = "int8-static", "int8-static-mse-equalized"
"""Precisions of the copy with outliers: the negative control, and what holds there."""


def detector_rows(seed: int, count: int, work: Path) -> list[Row]:
    """Return mAP@[.5:.95] of the detector and of a copy with outliers, on ``count`` scenes.

    The detector's training had neither the held-out labels nor the held-out wordings; the CLIP
    that it started from had both.
    """
    unseen = scenes("test", count, seed)
    data = calibration_scenes(work, "annotations.json")
    outliers = write_outliers(DETECTOR, work)
    rows = []
    for source, variants, bad in (
        (DETECTOR, ("int8-static", "int8-dynamic"), None),
        (outliers, (BAD, REMEDY), BAD),
    ):
        report = convert_source(source, work, variants, data)
        fp32 = detection_figures(report.path, "fp32", unseen)
        for variant in variants:
            int8 = detection_figures(report.path, variant, unseen)
            control = variant == bad
            found = control and caught(report, variant)
            for name, value in fp32.items():
                goal = GOAL if name == "map" else None
                figures = (value, int8[name])
                rows.append(Row(source.name, name, variant, count, *figures, goal, control, found))
    return rows


def detection_figures(
    bundle: Path, precision: str | Mapping[str, str], unseen: Sequence[Scene]
) -> dict[str, float]:
    """Return mAP of a bundle by name: all labels, those held out, and a held-out wording."""
    images = [np.asarray(render(scene, SIZE)) for scene in unseen]
    truth = [
        Boxes(
            np.array([pixel_box(thing, SIZE) for thing in scene.things]),
            np.array([LABELS.index(thing.label) for thing in scene.things]),
            np.zeros(len(scene.things)),
        )
        for scene in unseen
    ]
    figures = {}
    with mmedge.Detector.load(bundle, precision=precision) as detector:
        for wording in (WORDINGS[1], HELD_OUT_WORDINGS[0]):
            texts = [label_prompt(label, wording) for label in LABELS]
            found = [
                Boxes(each.boxes, each.class_id, each.scores)
                for each in detector.detect(images, texts, threshold=0.0, batch_size=1)
            ]
            matches = match_boxes(truth, found, len(LABELS))
            if wording in HELD_OUT_WORDINGS:
                figures["map_held_out_wording"] = mean_precision(matches)
                continue
            shown = sorted({int(number) for real in truth for number in real.classes})
            apart = [
                one
                for one, number in zip(matches, shown, strict=True)
                if LABELS[number] in HELD_OUT
            ]
            figures |= {
                "map": mean_precision(matches),
                "map_50": mean_precision(matches, slice(0, 1)),
                "map_held_out_labels": mean_precision(apart),
            }
    return figures
