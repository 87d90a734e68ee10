"""Features: the taps that one run of an encoder made, for any number of heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.kinds import EmbeddingKind
from mmedge.bundle.kinds.embedding import EMBEDDING
from mmedge.bundle.manifest import Variant
from mmedge.errors import InputError
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Features", "features_of", "tap_spaces"]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The taps of N samples, made by one run of an encoder.

    Attributes:
        modality: Of the encoder.
        arrays: By tap: `embedding` (N, D), `patches` (N, P, W), `tokens` (N, S, W).
        masks: By tap, (N, S) bool, for taps whose states do not all count.
        spaces: Fingerprint by tap: heads read no other.
        time: When the samples were taken, in seconds of one clock; None if unknown.
    """

    modality: Modality
    arrays: Mapping[str, Array]
    masks: Mapping[str, Array]
    spaces: Mapping[str, str]
    time: float | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, tap: str) -> Array:
        if tap not in self.arrays:
            raise InputError(
                f"No tap '{tap}', only {list(self.arrays)}. Convert the encoder with --taps {tap}."
            )
        return self.arrays[tap]

    @property
    def embedding(self) -> Float32Array:
        """(N, D) float32, L2-normalised."""
        embedding: Float32Array = self.arrays[EMBEDDING]
        return embedding

    def __repr__(self) -> str:
        taps = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        return f"<Features {self.modality.value}: {taps}>"


def tap_spaces(kind: EmbeddingKind, role: str, variant: Variant) -> dict[str, str]:
    """Return the fingerprint of each tap of an encoder, by tap.

    Args:
        kind: The section of the encoder's bundle.
        role: The encoder.
        variant: The variant of it that runs.
    """
    own = {name: variant.taps[name] for name, tap in kind.taps.items() if tap.role == role}
    return ({} if variant.space is None else {EMBEDDING: variant.space}) | own


def features_of(
    runs: Iterable[Mapping[str, Array]],
    kind: EmbeddingKind,
    role: str,
    first: str,
    spaces: Mapping[str, str],
    modality: Modality,
    time: float | None,
) -> Features:
    """Return the features that some runs of an encoder made, joined along their samples.

    Args:
        runs: Outputs by name, one mapping a batch; tokens may differ in their number.
        kind: The section of the encoder's bundle.
        role: The encoder.
        first: Its first output, the embedding.
        spaces: From tap_spaces.
        modality: Of the encoder.
        time: See Features.

    Raises:
        InputError: If there is no run.
    """
    parts = list(runs)
    if not parts:
        raise InputError(f"extract: got no {modality.value}, expected at least one.")
    taps = {name: tap for name, tap in kind.taps.items() if tap.role == role}
    arrays = {EMBEDDING: np.concatenate([part[first] for part in parts])}
    arrays[EMBEDDING] = arrays[EMBEDDING].astype(np.float32, copy=False)
    arrays |= {name: _joined([part[name] for part in parts]) for name in taps}
    masks = {
        name: _joined([part[tap.mask] for part in parts])
        for name, tap in taps.items()
        if tap.mask is not None
    }
    return Features(modality, arrays, masks, spaces, time)


def _joined(parts: Sequence[Array]) -> Array:
    """Join batches; shorter ones are padded with zeros, which their masks leave out."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    wide = [
        np.pad(part, [(0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)])
        for part in parts
    ]
    return np.concatenate(wide)
