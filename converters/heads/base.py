"""Description of a head: taps and sensors by input, and what happens without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from mmedge.bundle import Bundle, open_bundle
from mmedge.bundle.kinds import EmbeddingKind
from mmedge.bundle.kinds.embedding import EMBEDDING
from mmedge.bundle.kinds.heads import HeadInput, HeadSection, Meaning, Missing
from mmedge.bundle.tensors import OutputEntry
from mmedge.errors import ConversionError
from mmedge.files.safetensors_file import pack_safetensors
from mmedge.specs import Array, Dim, Modality, TensorSpec, did_you_mean

__all__ = [
    "HeadSpec",
    "SensorInput",
    "TapInput",
    "head_sample",
    "role_name",
]

Sample = Callable[[Mapping[str, int], int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class SensorInput:
    """An input that is an array of a sensor, (batch, ...).

    Attributes:
        missing: What happens without it.
        max_skew_ms: How much older than the newest input it may be; None where time plays no role.
        default: For the policy `default`: the array that was learned for it, without batch axis.
    """

    missing: Missing = "refuse"
    max_skew_ms: float | None = None
    default: Array | None = None


@dataclass(frozen=True)
class TapInput(SensorInput):
    """An input that is a tap of an encoder.

    An input of the module named as this one with `_mask` behind it takes the tap's mask.

    Attributes:
        modality: Of the encoder: "image" or "text".
        tap: "embedding", or a tap that the bundle was converted with.
    """

    modality: str = "image"
    tap: str = EMBEDDING


@dataclass(frozen=True)
class HeadSpec:
    """A head: what its module reads.

    Attributes:
        on: Bundles of the encoders whose taps it was trained on.
        inputs: By input of the module; masks and `present` are not among them.
        present: Input (batch, M) bool: which of the M inputs that are marginalized are there, in
            the order of `inputs`; None where there are none.
        labels: Names along the last axis of the first output.
        meanings: What outputs hold, by output.
        precision: Variant of the encoders that it was trained on; None for the default.
    """

    on: Path | str | Sequence[Path | str]
    inputs: Mapping[str, TapInput | SensorInput]
    present: str | None = None
    labels: Sequence[str] = ()
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    precision: str | None = None

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """The encoders' bundles, open."""
        places = [self.on] if isinstance(self.on, str | Path) else list(self.on)
        return tuple(open_bundle(place) for place in places)

    def files(self, role: str) -> dict[str, bytes]:
        """Return the content of the file of learned defaults, by its name; empty without any."""
        learned = {name: each.default for name, each in self.inputs.items()}
        arrays = {
            name: np.asarray(array, np.float32)
            for name, array in learned.items()
            if array is not None
        }
        return {f"{role}.safetensors": pack_safetensors(arrays)} if arrays else {}

    def section(self, inputs: Sequence[TensorSpec], role: str) -> HeadSection:
        """Return the section of the manifest, checked against the encoders.

        Args:
            inputs: Specs of the module's inputs.
            role: Name of the head's role.

        Raises:
            ConversionError: If an input is unknown, an encoder has no such tap, or one of another
                shape, or a value is none that a manifest takes.
        """
        try:
            return self._section(inputs, role)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConversionError(
                f"Head {role}: {place}: got {first['input']!r}: {first['msg']}. Change it in the "
                "head's description."
            ) from error

    def _section(self, inputs: Sequence[TensorSpec], role: str) -> HeadSection:
        """Return the section of the manifest; see section."""
        specs = {item.name: item for item in inputs}
        bundles = self.bundles
        read: dict[str, HeadInput] = {}
        for name, each in self.inputs.items():
            if name not in specs:
                raise ConversionError(
                    f"Head input '{name}' is none of the module's: {list(specs)}."
                    f"{did_you_mean(name, specs)}"
                )
            if (each.default is not None) != (each.missing == "default"):
                raise ConversionError(
                    f"Head input '{name}': a default array and missing='default' go together."
                )
            if each.default is not None:
                _check_default(specs[name], np.asarray(each.default))
            fields: dict[str, object] = {
                "missing": each.missing,
                "max_skew_ms": each.max_skew_ms,
            }
            if isinstance(each, TapInput):
                mask = f"{name}_mask" if f"{name}_mask" in specs else None
                space = self._space(bundles, each, specs[name])
                fields |= {
                    "modality": Modality(each.modality), "tap": each.tap, "space": space,
                    "mask": mask,
                }  # fmt: skip
            read[name] = HeadInput.model_validate(fields)
        masks = [each.mask for each in read.values() if each.mask is not None]
        named = {*read, *masks, *(() if self.present is None else (self.present,))}
        if rest := sorted(specs.keys() - named):
            raise ConversionError(
                f"The module's input '{rest[0]}' is described by no head input. Add a TapInput or "
                "a SensorInput for it."
            )
        return HeadSection(
            inputs=read,
            present=self.present,
            defaults=next(iter(self.files(role)), None),
            labels=tuple(self.labels),
            meanings=dict(self.meanings),
        )

    def _space(self, bundles: Sequence[Bundle], each: TapInput, spec: TensorSpec) -> str:
        """Return the fingerprint of a tap, found among the encoders."""
        offered: list[str] = []
        for bundle, modality in product(bundles, Modality):
            kind = bundle.manifest.kind
            role = kind.encoders.get(modality) if isinstance(kind, EmbeddingKind) else None
            if role is None or not isinstance(kind, EmbeddingKind):
                continue
            variant = bundle.variant(role, self.precision)
            outputs = {entry.name: entry for entry in bundle.role(role).outputs}
            taps = {EMBEDDING: variant.space} | variant.taps
            offered += [f"{modality.value} {tap}" for tap in taps]
            if modality.value != each.modality or (space := taps.get(each.tap)) is None:
                continue
            entry = bundle.role(role).outputs[0] if each.tap == EMBEDDING else outputs[each.tap]
            _check_shape(spec, each, entry)
            return space
        raise ConversionError(
            f"Head input '{spec.name}' reads the {each.modality} tap '{each.tap}'; the encoders "
            f"have {', '.join(offered) or 'none'}. Convert them with --taps {each.tap}."
        )


def _fits(wanted: Sequence[Dim], got: Sequence[Dim]) -> bool:
    """Return whether a shape has the wanted fixed sizes; a dynamic axis takes any."""
    return len(wanted) == len(got) and all(
        not isinstance(ours, int) or ours == theirs
        for ours, theirs in zip(wanted, got, strict=True)
    )


def _check_shape(spec: TensorSpec, each: TapInput, entry: OutputEntry) -> None:
    if not _fits(spec.shape, entry.shape) or spec.dtype.name != entry.dtype:
        raise ConversionError(
            f"Head input '{spec.name}' is {spec.dtype.name}{spec.shape}, but the tap "
            f"'{each.tap}' is {entry.dtype}{entry.shape}. Train the head on this encoder's taps."
        )


def _check_default(spec: TensorSpec, array: Array) -> None:
    shape = spec.shape[1:]
    if not _fits(shape, array.shape) or not np.isfinite(array).all():
        raise ConversionError(
            f"Head input '{spec.name}': the default is {array.shape}, expected finite values of "
            f"{shape}."
        )


def role_name(stem: str) -> str:
    """Return the name of a head's role from that of its bundle: "arm-reach" -> "arm_reach"."""
    name = re.sub("[^a-z0-9_]", "_", stem.lower())[:90]
    return name if name[:1].isalpha() else f"head_{name}"


def head_sample(
    sample: Sample, section: HeadSection, wired: Container[str] = frozenset()
) -> Sample:
    """Return a maker of inputs whose masks keep their first token, with every sensor present.

    Args:
        sample: Makes inputs of given sizes from a seed.
        section: What the head reads.
        wired: Inputs of the head that are none of the graph's, since encoders in it make them.
    """
    masks = (each.mask for each in section.inputs.values() if each.mask is not None)
    first = [mask for mask in masks if mask not in wired]

    def draw(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        feed = sample(sizes, seed)
        for name in first:
            feed[name][:, 0] = True
        if section.present is not None:
            feed[section.present][:] = True
        return feed

    return draw
