"""Report of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedge.bundle.manifest import Role
from mmedge.bundle.quality import Figure, Parity, Quality
from mmedge.bundle.tuning import Speed

__all__ = ["ConversionReport", "RoleDefault", "VariantReport"]


@dataclass(frozen=True)
class VariantReport:
    """One line of the summary."""

    role: str
    variant: str
    size_bytes: int
    parity: Parity | None
    quality: Quality | None
    duration_s: float


@dataclass(frozen=True)
class RoleDefault:
    """Default variant, compared with fp32.

    Attributes:
        variant: Its name.
        size_bytes: Of its files.
        fp32_size_bytes: Of fp32's files.
        speed: On this machine, None where it was not timed.
        metric: What `drop` is in.
        drop: What it loses to fp32.
        within: Whether that is within the accuracy budget.
    """

    variant: str
    size_bytes: int
    fp32_size_bytes: int
    speed: Speed | None
    metric: str
    drop: Figure
    within: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "variant": self.variant,
            "size_bytes": self.size_bytes,
            "fp32_size_bytes": self.fp32_size_bytes,
            "speed": None if self.speed is None else self.speed.model_dump(mode="json"),
            "metric": self.metric,
            "drop": self.drop.model_dump(),
            "within": self.within,
        }


@dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion.

    Attributes:
        path: The bundle.
        family: The model's family.
        variants: In the order of the manifest.
        defaults: Default variant, by role.
        notes: What a user should know: samples skipped, variants left out.
        calibration_samples: Samples that ranges were chosen from.
        duration_s: Wall time of the whole.
        skipped: A message for each sample that was left out.
        searched: Searched roles, as in the manifest.
    """

    path: Path
    family: str
    variants: tuple[VariantReport, ...]
    defaults: Mapping[str, RoleDefault]
    notes: tuple[str, ...]
    calibration_samples: int
    duration_s: float
    skipped: tuple[str, ...] = field(default=())
    searched: Mapping[str, Role] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "bundle": str(self.path),
            "family": self.family,
            "variants": [
                {
                    "role": line.role,
                    "variant": line.variant,
                    "size_bytes": line.size_bytes,
                    "parity": None if line.parity is None else line.parity.model_dump(),
                    "quality": None if line.quality is None else line.quality.model_dump(),
                    "duration_s": round(line.duration_s, 3),
                }
                for line in self.variants
            ],
            "defaults": {role: default.to_json() for role, default in self.defaults.items()},
            "search": {
                name: {"chosen": role.default, **role.search.model_dump(mode="json")}
                for name, role in self.searched.items()
                if role.search is not None
            },
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "calibration_samples": self.calibration_samples,
            "duration_s": round(self.duration_s, 3),
        }
