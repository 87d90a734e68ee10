"""A measured figure with its interval."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

__all__ = ["Figure", "FigureName"]

FigureName = Annotated[str, StringConstraints(pattern="^[a-z0-9_@]+$")]


class Figure(BaseModel):
    """A measured figure with its 95 % interval, from a bootstrap over the samples."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _check_order(self) -> Figure:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value {self.value} lies outside {self.low} to {self.high}")
        return self
