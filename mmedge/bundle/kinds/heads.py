"""Heads: graphs over taps of encoders and arrays of sensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mmedge.bundle.paths import BundlePath
from mmedge.bundle.tensors import TensorName
from mmedge.specs import Modality

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Role

__all__ = ["HeadInput", "HeadSection", "Meaning", "Missing"]

Missing: TypeAlias = Literal["refuse", "marginalize", "default"]
"""What happens where an input is missing: an error; an input marks it as missing and the graph
leaves it out; a learned array takes its place."""

Meaning: TypeAlias = Literal[
    "scores", "boxes", "relations", "alignment", "actions", "anomaly", "values"
]
"""What an output holds."""


class HeadInput(BaseModel):
    """An input of a head: a tap of an encoder, or an array of a sensor.

    Attributes:
        modality: Of the encoder; None for a sensor, as are the next three.
        tap: Its tap, as the encoder's bundle names it.
        space: Fingerprint of the tap.
        mask: Input (batch, tokens) bool of the head that takes the tap's mask, if any.
        missing: What happens without it.
        max_skew_ms: How much older than the newest input it may be; None where time plays no role.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    modality: Modality | None = None
    tap: TensorName | None = None
    space: Annotated[str, StringConstraints(min_length=1, max_length=300)] | None = None
    mask: TensorName | None = None
    missing: Missing = "refuse"
    max_skew_ms: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_tap(self) -> HeadInput:
        if len({self.modality is None, self.tap is None, self.space is None}) > 1:
            raise ValueError("modality, tap and space go together")
        if self.mask is not None and self.tap is None:
            raise ValueError("a sensor has no mask")
        return self


class HeadSection(BaseModel):
    """What a head reads and means.

    Attributes:
        inputs: By input of its graph.
        present: Input (batch, M) bool: which of the M inputs that are marginalized are there, in
            their order; None where there are none.
        defaults: File of the bundle (safetensors) with the array that stands for an input of
            policy `default`, without its batch axis.
        labels: Names along the last axis of the first output; empty if unnamed.
        meanings: What outputs hold, by output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    inputs: dict[TensorName, HeadInput] = Field(min_length=1)
    present: TensorName | None = None
    defaults: BundlePath | None = None
    labels: tuple[Annotated[str, StringConstraints(min_length=1, max_length=10_000)], ...] = ()
    meanings: dict[TensorName, Meaning] = Field(default_factory=dict)

    @property
    def marginalized(self) -> tuple[str, ...]:
        """Inputs that are left out where they are missing, in the order of `present`."""
        return tuple(name for name, each in self.inputs.items() if each.missing == "marginalize")

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the inputs and the labels."""
        for name, each in self.inputs.items():
            what = "sensor" if each.tap is None else f"{each.tap} of {each.space}"
            skew = "" if each.max_skew_ms is None else f", {each.max_skew_ms:g} ms of skew at most"
            yield f"reads {name}", f"{what}; missing: {each.missing}{skew}"
        if self.labels:
            yield "labels", f"{len(self.labels)}: {', '.join(self.labels[:4])}"

    def check(self, name: str, role: Role) -> None:
        """Check the section against the head's graph.

        Raises:
            ValueError: If they contradict each other.
        """
        shapes = {entry.name: entry.shape for entry in role.inputs}
        masks = [each.mask for each in self.inputs.values() if each.mask is not None]
        known = [*self.inputs, *masks, *([] if self.present is None else [self.present])]
        if sorted(known) != sorted(shapes):
            raise ValueError(f"{name}: its graph takes {sorted(shapes)}, unlike {sorted(known)}")
        if flat := [each for each in self.inputs if not shapes[each]]:
            raise ValueError(f"{name}: input {flat[0]!r} has no batch axis")
        count = len(self.marginalized)
        if (self.present is None) != (count == 0):
            raise ValueError(f"{name}: 'present' goes with inputs that are marginalized")
        if self.present is not None and shapes[self.present][1:] != (count,):
            raise ValueError(
                f"{name}: {self.present!r} is {shapes[self.present]}, expected (batch, {count})"
            )
        learned = any(each.missing == "default" for each in self.inputs.values())
        if (self.defaults is not None) != learned:
            raise ValueError(f"{name}: a file of defaults goes with inputs of that policy")
        outputs = {entry.name: entry.shape for entry in role.outputs}
        if unknown := sorted(self.meanings.keys() - outputs.keys()):
            raise ValueError(f"{name}: no output {unknown[0]!r}")
        first = role.outputs[0].shape
        if self.labels and (not first or first[-1] != len(self.labels)):
            raise ValueError(f"{name}: {len(self.labels)} labels for an output of {first}")
