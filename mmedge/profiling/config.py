"""Profile configuration: measurements and budgets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.runtimes.backends import DEFAULT_BACKEND

__all__ = ["QUICK", "Budget", "ProfileConfig"]

QUICK: dict[str, object] = {
    "sequences": ("golden",),
    "budget": {"seconds": 0.5, "min_runs": 10, "warmup_seconds": 0.1},
    "cold_starts": 1,
}
"""ProfileConfig fields of --quick; percentiles beyond p50 mostly need more runs."""

_FROZEN = ConfigDict(extra="forbid", frozen=True)

_Count = Annotated[int, Field(ge=1)]


class Budget(BaseModel):
    """Budget of one cell, measured until both `seconds` and `min_runs` are reached.

    Attributes:
        warmup_seconds: Runs thrown away first, at least three of them.
        seconds: Shortest measurement.
        min_runs: Fewest runs, however long they take.
        max_runs: Where it ends in any case.
    """

    model_config = _FROZEN
    warmup_seconds: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    seconds: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    min_runs: int = Field(default=20, ge=1)
    max_runs: int = Field(default=20_000, ge=1)


class ProfileConfig(BaseModel):
    """Settings of `profile`. Gates apply to the first entry of each list by default.

    Attributes:
        roles: Role names; None for all.
        precisions: Precisions or variant names; None for all.
        batches: Samples a run.
        threads: Threads inside one operator; None for one a processor that this process may use.
        sequences: Tokens a text: a number, "golden" (the true length of the bundle's golden
            texts) or "max" (what padding to the longest costs). A graph with a fixed length is
            measured at that alone.
        device: "cpu", "cuda" or "cuda:N".
        backend: One of mmedge.runtimes.BACKENDS.
        budget: For each cell.
        cold_starts: Fresh processes for cold start and memory, for each role and variant; 0 for
            none.
        stages: Whether to attribute the end-to-end latency to its stages.
        baseline: What to compare with, interleaved: a bundle, `BUNDLE:VARIANT`, `:VARIANT` of the
            same bundle, or an ONNX file; None for nothing.
        gates: Expressions such as "image_encoder.p95_ms > 20" that fail the profile where true.
    """

    model_config = _FROZEN
    roles: tuple[str, ...] | None = Field(default=None, min_length=1)
    precisions: tuple[str, ...] | None = Field(default=None, min_length=1)
    batches: tuple[_Count, ...] = Field(default=(1,), min_length=1)
    threads: tuple[_Count, ...] | None = Field(default=None, min_length=1)
    sequences: tuple[_Count | Literal["golden", "max"], ...] = Field(
        default=("golden", "max"), min_length=1
    )
    device: str = "cpu"
    backend: str = DEFAULT_BACKEND
    budget: Budget = Budget()
    cold_starts: int = Field(default=3, ge=0)
    stages: bool = True
    baseline: str | None = None
    gates: tuple[str, ...] = ()
