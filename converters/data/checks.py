"""Checks of calibration and evaluation data before a conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mmedge.ahead import run_ahead, worker_threads
from mmedge.converters.config import ConvertConfig, recipes, short_names
from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.converters.data.feeds import Samples, missing_data
from mmedge.converters.methods.recipes import Recipe, parse_recipe
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.errors import CalibrationError, InputError
from mmedge.preprocess import decode_image
from mmedge.preprocess.registry import Processor

if TYPE_CHECKING:
    from mmedge.converters.families.base import RoleSpec

__all__ = ["FEW_SAMPLES", "CheckedDataset", "Data", "check_dataset", "load_data", "plan_role"]

FEW_SAMPLES = 32
"""Minimum samples for reliable activation ranges."""
# Held back from the calibration data where no evaluation data is given: a fifth, within these.
_HELD_SHARE, _HELD_LEAST, _HELD_MOST = 5, 4, 500
_LEAST_SIDE = 1024  # of a JPEG above the limit of pixels: more than models take twice over


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset with only readable samples.

    Attributes:
        data: The usable samples.
        skipped: One message for each sample that was left out.
        contents: Hashes of the content, in the order of the samples.
    """

    data: Dataset
    skipped: tuple[str, ...]
    contents: tuple[bytes, ...]


@dataclass(frozen=True)
class Data:
    """Checked data.

    Attributes:
        calibration: Samples to choose ranges from, or None.
        evaluation: Held-out samples, or None.
        notes: What a user should know of them.
        skipped: One message for each sample that was left out.
    """

    calibration: Dataset | None
    evaluation: Dataset | None
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def check_dataset(
    data: Dataset,
    *,
    skip_bad: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> CheckedDataset:
    """Read every sample once, in threads.

    Args:
        data: What to check.
        skip_bad: Leave unreadable samples out instead of raising.
        advance: Called with (done, total) after each sample.

    Raises:
        CalibrationError: If a sample cannot be read (it is named) and skip_bad is False, or none
            can.
    """
    if data.arrays:
        rows = (b"".join(a[i].tobytes() for a in data.arrays.values()) for i in range(len(data)))
        return CheckedDataset(data, (), tuple(hashlib.sha256(row).digest() for row in rows))
    usable: list[Sample] = []
    skipped: list[str] = []
    contents: list[bytes] = []
    calls = (partial(_read, sample) for sample in data.samples)
    with closing(run_ahead(calls, threads=worker_threads(data.samples), ahead=1)) as read:
        for done, (sample, content) in enumerate(zip(data.samples, read, strict=True), start=1):
            if isinstance(content, bytes):
                usable.append(sample)
                contents.append(content)
            elif skip_bad:
                skipped.append(str(content))
            else:
                raise CalibrationError(
                    f"{data.name}: {content} Remove the file, or leave such files out with "
                    "--skip-bad."
                ) from content
            if advance is not None:
                advance(done, len(data.samples))
    if not usable:
        raise CalibrationError(
            f"{data.name}: none of its {len(data.samples)} samples can be read. The first: "
            f"{skipped[0]}"
        )
    return CheckedDataset(replace(data, samples=tuple(usable)), tuple(skipped), tuple(contents))


def _read(sample: Sample) -> bytes | InputError:
    try:
        return _content(sample)
    except InputError as error:
        return error


def _content(sample: Sample) -> bytes:
    """Return a hash of a sample's content, as read by a processor."""
    from mmedge.preprocess.video_file import spread_frames
    from mmedge.preprocess.waveform import load_waveform

    digest = hashlib.sha256()
    if sample.image is not None:
        digest.update(decode_image(sample.image, least_side=_LEAST_SIDE).tobytes())
    if sample.audio is not None:
        digest.update(load_waveform(sample.audio, 16_000).tobytes())
    if sample.video is not None:
        (frame,) = spread_frames(sample.video, 1)
        digest.update(frame.tobytes())
    if sample.image is None and sample.audio is None and sample.video is None:
        digest.update((sample.caption or "").encode())
    return digest.digest()


def load_data(config: ConvertConfig, datasets: Mapping[str, Dataset], progress: Progress) -> Data:
    """Check calibration and evaluation data.

    Without evaluation data a part of the calibration data is held back for it.

    Args:
        config: Settings.
        datasets: "calibration" and "evaluation", as far as they are given.
        progress: Progress callback.

    Raises:
        CalibrationError: If either cannot be used, if all calibration samples are the same, or if
            a sample is in both.
    """
    notes: list[str] = []
    skipped: list[str] = []
    checked: dict[str, CheckedDataset] = {}
    for what, data in datasets.items():
        stage = f"Check the {what} data"
        progress(ProgressEvent(stage, 0, 1))
        found = check_dataset(
            data,
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
                f"{what} samples cannot be read and were skipped."
            )
    calibration, evaluation = checked.get("calibration"), checked.get("evaluation")
    if calibration is not None:
        notes += _check_calibration(calibration)
    if calibration is not None and evaluation is not None:
        _check_disjoint(calibration, evaluation)
    elif calibration is not None and (split := _hold_back(calibration, config.seed)) is not None:
        calibration, held = split
        notes.append(
            f"{len(held)} of the calibration samples were held back to measure quality on. Pass "
            "--evaluate to use your own."
        )
        return Data(calibration.data, held, tuple(notes), tuple(skipped))
    return Data(
        calibration.data if calibration else None,
        evaluation.data if evaluation else None,
        tuple(notes),
        tuple(skipped),
    )


def _hold_back(checked: CheckedDataset, seed: int) -> tuple[CheckedDataset, Dataset] | None:
    """Split calibration data, equal samples together; None where there is too little."""
    kinds = list(dict.fromkeys(checked.contents))
    held = min(len(kinds) // _HELD_SHARE, _HELD_MOST)
    if held < _HELD_LEAST:
        return None
    chosen = {kinds[i] for i in np.random.default_rng([seed, 3]).permutation(len(kinds))[:held]}
    inside = np.array([content in chosen for content in checked.contents])
    data = checked.data
    kept = tuple(content for content in checked.contents if content not in chosen)
    rest = CheckedDataset(data.rows(np.flatnonzero(~inside)), checked.skipped, kept)
    part = data.rows(np.flatnonzero(inside))
    return rest, replace(part, name=f"{data.name}, held back")


def plan_role(
    config: ConvertConfig,
    data: Data,
    role: str,
    spec: RoleSpec,
    processors: Mapping[str, Processor],
) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """Return the recipes of a role, and notes on skipped ones.

    Raises:
        CalibrationError: If a named variant lacks calibration data.
    """
    wanted = recipes(config, role)
    if data.calibration is None:
        return wanted, ()
    missing = missing_data(spec, Samples.of(data.calibration, processors))
    if missing is None:
        return wanted, ()
    left_out = [recipe for recipe in wanted if recipe.needs_calibration]
    why = f"{data.calibration.name} has no {missing.removeprefix('an ')} to calibrate {role} with"
    named = {name for name in config.of_role(role) if name not in short_names(config.targets)}
    for recipe in left_out:
        if recipe.variant in {parse_recipe(name).variant for name in named}:
            raise CalibrationError(
                f"{why}. Add {missing}, or give the role a precision of its own that needs "
                f"none: --precision ...,{role}:int8-dynamic."
            )
    notes = tuple(f"{why}: {role}/{recipe.variant} was left out." for recipe in left_out)
    return tuple(recipe for recipe in wanted if recipe not in left_out), notes


def _check_disjoint(calibration: CheckedDataset, evaluation: CheckedDataset) -> None:
    if shared := set(calibration.contents) & set(evaluation.contents):
        raise CalibrationError(
            f"{evaluation.data.name}: {len(shared)} of its samples are also calibration "
            "samples. Quality is never measured on those: pass disjoint sets."
        )


def _check_calibration(checked: CheckedDataset) -> list[str]:
    count, different = len(checked.contents), len(set(checked.contents))
    if different == 1 and count > 1:
        raise CalibrationError(
            f"{checked.data.name}: all {count} samples are the same. Pass samples as various as "
            "those that the device will see."
        )
    if different < FEW_SAMPLES:
        few = f"Only {different} different calibration samples"
        return [f"{few}: {FEW_SAMPLES} or more, better hundreds, give ranges that hold for others."]
    return []
