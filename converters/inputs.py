"""Opening what a conversion is given: calibration and evaluation data, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from mmedge.converters.calibration import FEW_SAMPLES, CheckedDataset, check_dataset
from mmedge.converters.config import ConvertConfig, Progress, ProgressEvent
from mmedge.converters.datasets import Dataset, read_dataset
from mmedge.errors import CalibrationError

__all__ = ["Data", "load_data"]


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
