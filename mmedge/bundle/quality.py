"""Measured figures of a variant: parity, quality, tolerance."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

__all__ = ["Figure", "FigureName", "Parity", "Quality", "Tolerance"]

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

FigureName = Annotated[str, StringConstraints(pattern="^[a-z0-9_@]+$")]


class Figure(BaseModel):
    """A measured figure with its 95 % interval, from a bootstrap over the samples."""

    model_config = _FROZEN
    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _check_order(self) -> Figure:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value {self.value} lies outside {self.low} to {self.high}")
        return self


class Parity(BaseModel):
    """Agreement with the source model on the same inputs, measured at conversion.

    Attributes:
        max_abs_error: Largest difference of a value, over all compared outputs.
        cosine_mean: Mean cosine of rows: vectors of outputs compared by rows or tokens, whole
            samples of outputs compared by values.
        cosine_min: Smallest cosine of a row.
        token_agreement: Share of rows with the same largest value, for outputs compared by tokens.
        samples: Rows compared.
    """

    model_config = _FROZEN
    max_abs_error: float
    cosine_mean: float
    cosine_min: float
    token_agreement: float | None = Field(default=None, ge=0, le=1)
    samples: int = Field(ge=1)


class Quality(BaseModel):
    """Fidelity to the fp32 variant on held-out data, never on calibration data.

    Which figures there are, and what they mean, is the business of the kind's evaluation.

    Attributes:
        figures: By name, larger is better.
        drops: Loss of each task figure: fp32's less the variant's, on the same samples.
        samples: Samples behind the figures.
        data: Name of the data.
        settings: Settings of the figures, such as `top_k`.
    """

    model_config = _FROZEN
    figures: dict[FigureName, Figure] = Field(min_length=1)
    drops: dict[FigureName, Figure] = Field(default_factory=dict)
    samples: int = Field(ge=1)
    data: str
    settings: dict[str, int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_drops(self) -> Quality:
        for name in self.drops:
            if name not in self.figures:
                raise ValueError(f"drop of {name!r}, which is not among the figures")
        return self

    def value(self, name: str) -> float | None:
        """Return a figure without its interval, None where it was not measured."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value


class Tolerance(BaseModel):
    """Largest difference from the golden outputs that `verify` accepts.

    Golden outputs are the variant's own, computed at conversion by ONNX Runtime on CPU; another
    processor rounds differently, an integer kernel more so than a float one.

    Attributes:
        cosine_min: Smallest cosine of a row; see Parity.
        max_abs_error: Largest difference of a value, relative to the largest golden value where
            that is above 1.
    """

    model_config = _FROZEN
    cosine_min: float = Field(ge=0, le=1)
    max_abs_error: float = Field(ge=0, le=1)
