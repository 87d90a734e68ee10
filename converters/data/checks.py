"""Opening what a conversion is given: calibration and evaluation data, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from mmedge.converters.config import ConvertConfig, recipes, short_names
from mmedge.converters.data.datasets import Dataset, read_dataset
from mmedge.converters.data.feeds import FEW_SAMPLES, CheckedDataset, check_dataset
from mmedge.converters.methods.recipes import Recipe, parse_recipe
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.errors import CalibrationError
from mmedge.specs import Modality

__all__ = ["Data", "load_data", "plan_role"]


@dataclass(frozen=True)
class Data:
    """Data that can be used.

    Attributes:
        calibration: Pictures to choose ranges from, or None.
        evaluation: Held-out pictures, or None.
        notes: What a user should know of them.
        skipped: One message for each picture that was left out.
    """

    calibration: Dataset | None
    evaluation: Dataset | None
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def load_data(config: ConvertConfig, progress: Progress) -> Data:
    """Read and check calibration and evaluation data.

    Raises:
        CalibrationError: If either cannot be used, if all calibration pictures are the same, or if
            a picture is in both.
    """
    notes: list[str] = []
    skipped: list[str] = []
    checked: dict[str, CheckedDataset] = {}
    for what, path in (("calibration", config.calibration), ("evaluation", config.evaluate)):
        if path is None:
            continue
        stage = f"Check the {what} pictures"
        progress(ProgressEvent(stage, 0, 1))
        found = check_dataset(
            read_dataset(path),
            skip_bad=config.skip_bad,
            advance=lambda done, total, stage=stage: progress(  # type: ignore[misc]
                ProgressEvent(stage, done, total)
            ),
        )
        checked[what] = found
        skipped += found.skipped
        if found.skipped:
            notes.append(
                f"{len(found.skipped)} of {len(found.skipped) + len(found.data.samples)} "
                f"{what} pictures cannot be read and were skipped."
            )
    calibration, evaluation = checked.get("calibration"), checked.get("evaluation")
    if calibration is not None:
        notes += _judge_calibration(calibration)
    if calibration is not None and evaluation is not None:
        _check_disjoint(calibration, evaluation)
    return Data(
        calibration.data if calibration else None,
        evaluation.data if evaluation else None,
        tuple(notes),
        tuple(skipped),
    )


def plan_role(
    config: ConvertConfig, data: Data, role: str, modality: Modality
) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Return the recipes for a role, and notes on those that are left out.

    Raises:
        CalibrationError: If a variant that was asked for by name lacks data to calibrate with.
    """
    wanted = recipes(config, role)
    without_texts = data.calibration is not None and not data.calibration.captions
    if modality is not Modality.TEXT or not without_texts or data.calibration is None:
        return wanted, ()
    left_out = [recipe for recipe in wanted if recipe.needs_calibration]
    why = f"{data.calibration.name} has no captions to calibrate {role} with"
    named = {name for name in config.of_role(role) if name not in short_names(config.target)}
    for recipe in left_out:
        if recipe.variant in {parse_recipe(name).variant for name in named}:
            raise CalibrationError(
                f"{why}. Add a captions.jsonl, or give the role a precision of its own that needs "
                f"none: --precision ...,{role}:int8-dynamic."
            )
    notes = tuple(f"{why}: {role}/{recipe.variant} was left out." for recipe in left_out)
    return tuple(recipe for recipe in wanted if recipe not in left_out), notes


def _check_disjoint(calibration: CheckedDataset, evaluation: CheckedDataset) -> None:
    if shared := calibration.contents & evaluation.contents:
        raise CalibrationError(
            f"{evaluation.data.name}: {len(shared)} of its pictures are also calibration "
            "pictures. Quality is never measured on those: pass disjoint sets."
        )


def _judge_calibration(checked: CheckedDataset) -> list[str]:
    count = len(checked.data.samples)
    if len(checked.contents) == 1 and count > 1:
        raise CalibrationError(
            f"{checked.data.name}: all {count} pictures are the same. Pass pictures as various as "
            "those that the device will see."
        )
    if len(checked.contents) < FEW_SAMPLES:
        few = f"Only {len(checked.contents)} different calibration pictures"
        return [f"{few}: {FEW_SAMPLES} or more, better hundreds, give ranges that hold for others."]
    return []
