"""Profile inputs: the bundle's golden inputs, tiled, and texts of any length."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mmedge.bundle.golden import Golden
from mmedge.bundle.opening import Bundle
from mmedge.errors import ProfileError
from mmedge.preprocess.config import TextConfig, VideoConfig
from mmedge.preprocess.text import TextProcessor
from mmedge.specs import Array, Modality

__all__ = ["FRAME_SIZE", "TEXT", "Inputs", "frame_jpeg", "sample_of", "text_config"]

FRAME_SIZE = (1280, 720)
_RATE = 48_000
TEXT = "a photo of a red circle to the left of a small blue square"


def frame_jpeg() -> bytes:
    """Return a synthetic 1280x720 JPEG with photo-like detail, less at high frequencies.

    The same bytes on every call with the same Pillow; about the size of a camera's frame, since a
    flat or a random image would decode much faster or slower than a real one.
    """
    rng = np.random.default_rng(0)
    width, height = FRAME_SIZE
    total = np.zeros((height, width, 3), np.float32)
    for octave, weight in ((5, 1.0), (20, 0.5), (80, 0.25), (320, 0.12), (1280, 0.03)):
        rows = max(octave * height // width, 2)
        noise = rng.integers(0, 256, (rows, octave, 3), np.uint8)
        scaled = Image.fromarray(noise).resize(FRAME_SIZE, Image.Resampling.BICUBIC)
        total += (np.asarray(scaled, np.float32) - 127.5) * weight
    buffer = io.BytesIO()
    pixels = np.clip(total + 127.5, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample_of(bundle: Bundle, role: str) -> object | None:
    """Return one raw input of a role: an image file, a text, a sound, frames; None for others."""
    modality = bundle.manifest.modality(role)
    if modality is Modality.IMAGE:
        return frame_jpeg()
    if modality is Modality.TEXT:
        return TEXT
    if modality is Modality.AUDIO:
        time = np.arange(_RATE * 3) / _RATE
        return 0.3 * np.sin(2 * np.pi * 440 * time).astype(np.float32), _RATE
    config = bundle.manifest.processors.get(bundle.manifest.processor_of(role) or "")
    return [frame_jpeg()] * config.frames if isinstance(config, VideoConfig) else None


def text_config(bundle: Bundle, role: str) -> TextConfig | None:
    """Return the text processor that makes all inputs of a role, None if there is none."""
    name = bundle.manifest.processor_of(role)
    config = None if name is None else bundle.manifest.processors[name]
    names = {entry.name for entry in bundle.role(role).inputs}
    return config if isinstance(config, TextConfig) and names == set(config.inputs) else None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Feeds for the roles of one bundle.

    Attributes:
        bundle: The bundle.
        golden: Its golden vectors.
    """

    bundle: Bundle
    golden: Golden

    @classmethod
    def of(cls, bundle: Bundle) -> Inputs:
        """Read the golden vectors of a bundle.

        Raises:
            IntegrityError: If they are missing or damaged.
        """
        return cls(bundle, bundle.golden())

    def sequences(
        self, role: str, wanted: Sequence[int | Literal["golden", "max"]]
    ) -> tuple[int | None, ...]:
        """Return the sequence lengths to measure a role at.

        Args:
            role: Role name.
            wanted: As in ProfileConfig.

        Returns:
            Distinct lengths in the order requested; (None,) for a role that takes no text.

        Raises:
            ProfileError: If a length is longer than the model takes, or differs from the one that
                the graph is fixed to.
        """
        text = text_config(self.bundle, role)
        if text is None:
            return (None,)
        fixed = self._fixed_length(role, text)
        lengths: list[int] = []
        for length in wanted:
            if fixed is not None and length in (fixed, "golden", "max"):
                resolved = fixed
            elif fixed is not None:
                raise ProfileError(
                    f"--sequence {length}: {role} takes exactly {fixed} tokens. "
                    "Leave the option out."
                )
            elif length == "max":
                resolved = text.max_length
            elif length == "golden":
                resolved = self._golden_length(role, text)
            elif isinstance(length, int) and length <= text.max_length:
                resolved = length
            else:
                raise ProfileError(
                    f"--sequence {length}: {role} takes at most {text.max_length} tokens."
                )
            if resolved not in lengths:
                lengths.append(resolved)
        return tuple(lengths)

    def feed(self, role: str, batch: int, sequence: int | None) -> Mapping[str, Array]:
        """Return C-contiguous inputs of a role.

        Args:
            role: Role name.
            batch: Samples; the golden inputs are repeated as often as it takes.
            sequence: Tokens, from `sequences`.
        """
        text = text_config(self.bundle, role)
        if sequence is not None and text is not None:
            width = int(self.golden.inputs[role][text.input].shape[1])
            if self._fixed_length(role, text) is None or width != sequence:
                return self._text_feed(text, batch, sequence)
        return {
            name: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))
            for name, array in self.golden.inputs[role].items()
        }

    def _text_feed(self, config: TextConfig, batch: int, sequence: int) -> dict[str, Array]:
        """Return texts of exactly `sequence` tokens, with the closing special token last."""
        row = self._tokenize(config, " ".join([TEXT] * config.max_length))
        row = [*row[: sequence - 1], row[-1]]
        row += [config.pad_id] * (sequence - len(row))
        feed: dict[str, Array] = {config.input: np.tile(np.array(row, np.int64), (batch, 1))}
        if config.attention_mask is not None:
            feed[config.attention_mask] = np.ones((batch, sequence), np.int64)
        if config.positions is not None:
            feed[config.positions] = np.zeros((batch, 1), np.int64)
        return feed

    def _tokenize(self, config: TextConfig, text: str) -> list[int]:
        return TextProcessor.open(config, self.bundle.path).tokenize([text])[0]

    def _fixed_length(self, role: str, text: TextConfig) -> int | None:
        """Return the fixed text length, None if it varies."""
        axis = next(e for e in self.bundle.role(role).inputs if e.name == text.input).shape[1]
        if isinstance(axis, int):
            return axis
        return text.max_length if text.padding == "max_length" else None

    def _golden_length(self, role: str, config: TextConfig) -> int:
        """Return the median number of tokens of the golden texts, without padding."""
        closing = self._tokenize(config, "a")[-1]
        lengths: list[int] = []
        for row in self.golden.inputs[role][config.input]:
            tokens = np.flatnonzero(row != config.pad_id)
            length = int(tokens[-1]) + 1 if len(tokens) else 0
            # If the closing token also pads (as CLIP's does), the first one is a real token.
            lengths.append(min(length + (closing == config.pad_id), len(row)))
        return max(round(statistics.median_high(lengths)), 1)
