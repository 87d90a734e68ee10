"""Figures of the trained CLAP, taken from its bundle in fp32 and in int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from encoder_rows import (
    CALIBRATION,
    JUDGED,
    SHAPES,
    Row,
    caught,
    convert_source,
    write_outliers,
)
from generate_sounds import captioned_sounds, write_sounds
from metrics import pair_accuracy, recall_at_k
from playing import RATE, play
from sound_captions import sound_caption
from sounds import Sound

import mmedge
from mmedge.specs import Float32Array

CLAP = SHAPES / "clap"
BAD = "int8-static"
"""Precision of the copy with outliers: the negative control."""
_GOALS = {"recall@1": 0.9, "audio_to_text_recall@1": 0.9, "order": None}


@dataclass(frozen=True)
class Unseen:
    """Sounds of the test split with captions worded as none in training was.

    Attributes:
        audio: Samples and rate of each.
        texts: A caption of each.
        ordered: Positions of those in which neighbours can be exchanged.
        orders: Of each of these, a caption, and the same with the neighbours exchanged.
    """

    audio: tuple[tuple[Float32Array, int], ...]
    texts: tuple[str, ...]
    ordered: tuple[int, ...]
    orders: tuple[tuple[str, str], ...]

    @classmethod
    def draw(cls, seed: int, count: int) -> Unseen:
        """Draw and play sounds."""
        pairs = captioned_sounds("test", count, seed)
        others = {index: exchanged(sound) for index, (sound, _) in enumerate(pairs)}
        swaps = {index: other for index, other in others.items() if other is not None}
        orders = tuple(
            (_worded(pairs[index][0], index), _worded(other, index))
            for index, other in swaps.items()
        )
        audio = tuple((play(sound), RATE) for sound, _ in pairs)
        return cls(audio, tuple(text for _, text in pairs), tuple(swaps), orders)


def clap_rows(seed: int, count: int, work: Path) -> list[Row]:
    """Return figures of the CLAP and of a copy with outliers, on ``count`` sounds."""
    unseen = Unseen.draw(seed, count)
    data = calibration_sounds(work)
    rows = []
    for source, variants, bad in (
        (CLAP, ("int8-static", "int8-dynamic"), None),
        (write_outliers(CLAP, work), (BAD,), BAD),
    ):
        # RoBERTa's LayerNorms take no outliers, so the control is the audio tower.
        wanted: tuple[str, ...] = (
            variants if bad is None else ("audio_encoder:fp32", f"audio_encoder:{bad}")
        )
        report = convert_source(source, work, wanted, data)
        fp32 = sound_figures(report.path, "fp32", unseen)
        for variant in variants:
            control = variant == bad
            chosen: Mapping[str, str] | str = variant
            if control:
                chosen = {"audio_encoder": variant, "text_encoder": "fp32"}
            int8 = sound_figures(report.path, chosen, unseen)
            found = control and caught(report, variant)
            for name, goal in _GOALS.items():
                # The control is judged by one figure.
                asked = goal if name == "recall@1" or not control else None
                figures = (fp32[name], int8[name])
                rows.append(Row(source.name, name, variant, count, *figures, asked, control, found))
    return rows


def calibration_sounds(work: Path) -> tuple[Path, Path]:
    """Write sounds of the calibration split for ``convert_source``."""
    folders = work / "calibration", work / "judged"
    for seed, (folder, count) in enumerate(zip(folders, (CALIBRATION, JUDGED), strict=True)):
        write_sounds(captioned_sounds("calibration", count, seed), folder)
    return folders


def sound_figures(
    bundle: Path, precision: str | Mapping[str, str], unseen: Unseen
) -> dict[str, float]:
    """Return figures of a bundle by name.

    ``recall@1`` is text to audio. ``order`` is the share of sounds that are nearer to their caption
    than to the same caption with two neighbouring events exchanged; chance is 0.5.
    """
    with mmedge.DualEncoder.load(bundle, precision=precision) as clap:
        audio = clap.encode_audio(list(unseen.audio), batch_size=1)
        texts = clap.encode_text(unseen.texts, batch_size=1)
        right, wrong = (
            clap.encode_text(some, batch_size=1) for some in zip(*unseen.orders, strict=True)
        )
    return {
        "recall@1": recall_at_k(texts, audio, 1),
        "audio_to_text_recall@1": recall_at_k(audio, texts, 1),
        "order": pair_accuracy(audio[list(unseen.ordered)], right, wrong),
    }


def exchanged(sound: Sound) -> Sound | None:
    """Return a sound with two neighbours exchanged, unlike tones or digits; None without such."""
    events = list(sound.events)
    for at, (first, second) in enumerate(pairwise(events)):
        if type(first) is type(second) and first != second:
            events[at], events[at + 1] = second, first
            return replace(sound, events=tuple(events))
    return None


def _worded(sound: Sound, seed: int) -> str:
    return sound_caption(sound, np.random.default_rng(seed), unseen=True)
