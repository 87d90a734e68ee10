"""Inputs, outputs, axes and state of a role in the manifest."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from mmedge.specs import Axis, Compare, State, StateTensor, TensorSpec

__all__ = [
    "AxisEntry",
    "AxisName",
    "AxisSize",
    "CallerFeed",
    "Feed",
    "InputEntry",
    "OutputEntry",
    "ProcessorFeed",
    "RoleFeed",
    "RoleName",
    "StateEntry",
    "StateFeed",
    "StateTensorEntry",
    "TensorEntry",
    "TensorName",
]

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_DTYPES += ("float16", "float32", "float64")
_LARGEST = 2**31 - 1


def _check_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; expected one of {', '.join(_DTYPES)}")
    return name


AxisSize = Annotated[int, Field(ge=1, le=_LARGEST)]
AxisName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
RoleName = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$", max_length=100)]
TensorName = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class TensorEntry(BaseModel):
    """A TensorSpec as JSON: dtype by its numpy name, a str in shape is a dynamic axis."""

    model_config = _FROZEN
    name: TensorName
    dtype: Annotated[str, AfterValidator(_check_dtype)]
    shape: tuple[AxisSize | AxisName, ...] = Field(max_length=16)

    def spec(self) -> TensorSpec:
        """Return the spec that this entry describes."""
        return TensorSpec(self.name, np.dtype(self.dtype), self.shape)


class ProcessorFeed(BaseModel):
    """The input is made by a processor of the bundle."""

    model_config = _FROZEN
    processor: str


class RoleFeed(BaseModel):
    """The input is another role's output."""

    model_config = _FROZEN
    role: RoleName
    output: TensorName


class StateFeed(BaseModel):
    """The input is the role's own state."""

    model_config = _FROZEN
    state: Literal[True] = True


class CallerFeed(BaseModel):
    """The input is given by the caller as an array."""

    model_config = _FROZEN
    caller: Literal[True] = True


Feed: TypeAlias = ProcessorFeed | RoleFeed | StateFeed | CallerFeed
"""Source of an input."""


class InputEntry(TensorEntry):
    """An input of a role and its source."""

    feed: Feed

    @classmethod
    def of(cls, spec: TensorSpec, feed: Feed) -> InputEntry:
        """Return the entry that describes a spec."""
        return cls(name=spec.name, dtype=spec.dtype.name, shape=spec.shape, feed=feed)


class OutputEntry(TensorEntry):
    """An output of a role and its comparison with the reference."""

    compare: Compare = Compare.NONE

    @model_validator(mode="after")
    def _check_rows(self) -> OutputEntry:
        if self.compare in (Compare.ROWS, Compare.TOKENS) and not self.shape:
            raise ValueError(f"{self.name!r} is a scalar, which has no {self.compare.value}")
        return self

    @classmethod
    def of(cls, spec: TensorSpec, compare: Compare) -> OutputEntry:
        """Return the entry that describes a spec."""
        return cls(name=spec.name, dtype=spec.dtype.name, shape=spec.shape, compare=compare)


class AxisEntry(BaseModel):
    """Bounds of a dynamic axis."""

    model_config = _FROZEN
    min: int = Field(ge=0, le=_LARGEST)
    opt: int = Field(ge=0, le=_LARGEST)
    max: int = Field(ge=1, le=_LARGEST)

    @model_validator(mode="after")
    def _check_order(self) -> AxisEntry:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"got min {self.min}, opt {self.opt}, max {self.max}, not ascending")
        return self

    @classmethod
    def of(cls, axis: Axis) -> AxisEntry:
        """Return the entry that describes an axis."""
        return cls(min=axis.min, opt=axis.opt, max=axis.max)

    def axis(self) -> Axis:
        """Return the axis that this entry describes."""
        return Axis(self.min, self.opt, self.max)


class StateTensorEntry(BaseModel):
    """A StateTensor as JSON."""

    model_config = _FROZEN
    input: TensorName
    output: TensorName | None = None
    update: Literal["append", "in_place", "replace", "constant"]
    axis: int | None = Field(default=None, ge=0, le=15)
    source: tuple[RoleName, TensorName] | None = None

    @model_validator(mode="after")
    def _check_update(self) -> StateTensorEntry:
        if (self.axis is not None) != (self.update in ("append", "in_place")):
            raise ValueError(f"state {self.input!r}: an axis goes with append and in_place alone")
        if (self.output is None) != (self.update == "constant"):
            raise ValueError(f"state {self.input!r}: an output goes with all but constant")
        return self


class StateEntry(BaseModel):
    """A State as JSON."""

    model_config = _FROZEN
    tensors: tuple[StateTensorEntry, ...] = Field(min_length=1)
    length: AxisName | None = None
    capacity: int | None = Field(default=None, ge=1, le=_LARGEST)
    batch: AxisName = "batch"
    new: AxisName = "sequence"
    kept: AxisName | None = None

    @classmethod
    def of(cls, state: State) -> StateEntry:
        """Return the entry that describes a state."""
        return cls(
            tensors=tuple(
                StateTensorEntry(
                    input=t.input, output=t.output, update=t.update, axis=t.axis, source=t.source
                )
                for t in state.tensors
            ),
            length=state.length,
            capacity=state.capacity,
            batch=state.batch,
            new=state.new,
            kept=state.kept,
        )

    def state(self) -> State:
        """Return the state that this entry describes."""
        return State(
            tuple(StateTensor(t.input, t.output, t.update, t.axis, t.source) for t in self.tensors),
            self.length,
            self.capacity,
            self.batch,
            self.new,
            self.kept,
        )
