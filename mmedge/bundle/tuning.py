"""Search record: every candidate of a role, and why it was kept or dropped."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mmedge.bundle.quality import Figure

__all__ = ["Candidate", "Objective", "SearchRecord", "Speed", "Verdict"]

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

Name = Annotated[str, StringConstraints(pattern="^[a-z0-9][a-z0-9._-]*$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Verdict = Literal["chosen", "front", "dropped"]
Objective = Literal["latency", "size", "energy"]


class Speed(BaseModel):
    """Speed of a candidate on the search machine, alternating with fp32.

    Attributes:
        backend: The fastest backend for it there.
        latency_ms: Median of one call at batch 1.
        ratio: To the fastest fp32 of the same rounds; below 1 is faster.
        energy_mj: Of one call, where the machine has a counter that can be read.
    """

    model_config = _FROZEN
    backend: Text
    latency_ms: float = Field(gt=0)
    ratio: Figure
    energy_mj: float | None = Field(default=None, gt=0)


class Candidate(BaseModel):
    """One variant that the search tried or could not try.

    Attributes:
        variant: Its name, which spells how it was made.
        drop: What it loses of the metric, with its interval; None where it was not measured.
        cosine_mean: Mean cosine with fp32, None where it was not measured.
        size_bytes: Of its files, None where it was not made.
        speed: None where it was not timed.
        verdict: "chosen" is what `load` takes; "front" is in the bundle too: nothing else within
            the budget is both as good and as fast (small, frugal); "dropped" is not.
        reason: Why.
        duration_s: Wall time to make and measure it.
    """

    model_config = _FROZEN
    variant: Name
    drop: Figure | None = None
    cosine_mean: float | None = None
    size_bytes: int | None = Field(default=None, ge=0)
    speed: Speed | None = None
    verdict: Verdict
    reason: Text
    duration_s: float = Field(default=0.0, ge=0)


class SearchRecord(BaseModel):
    """The search for one role.

    Attributes:
        metric: What the budget is in.
        max_drop: How much of it may be lost.
        objective: What was to be made small.
        processor: Where speed was measured.
        threads: Of the runs that were timed.
        data: What fidelity was measured on.
        samples: How many samples that was.
        joint_drop: What is lost of the metric when every role runs what was chosen for it; None
            where the metric is of one role alone.
        energy_counter: What counted energy ("RAPL: package-0"), None where it was not measured.
        candidates: In the order in which they were tried, fp32 first.
    """

    model_config = _FROZEN
    metric: Text
    max_drop: float = Field(ge=0)
    objective: Objective
    processor: Text
    threads: int = Field(ge=1)
    data: Text
    samples: int = Field(ge=1)
    joint_drop: Figure | None = None
    energy_counter: Text | None = None
    candidates: tuple[Candidate, ...] = Field(min_length=1, max_length=1000)

    @property
    def decimals(self) -> int:
        """Decimals that show two digits of the budget."""
        if self.max_drop <= 0:
            return 4
        return min(max(3, 1 - math.floor(math.log10(self.max_drop))), 8)

    @model_validator(mode="after")
    def _check_chosen(self) -> SearchRecord:
        chosen = [one.variant for one in self.candidates if one.verdict == "chosen"]
        if len(chosen) != 1:
            raise ValueError(f"expected one chosen candidate, got {chosen}")
        return self
