"""Report of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedge.bundle.manifest import Parity, Quality, Role

__all__ = ["ConversionReport", "VariantReport"]


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
class ConversionReport:
    """What came of a conversion.

    Attributes:
        path: The bundle.
        family: The model's family.
        variants: In the order of the manifest.
        notes: What a user should know: pictures skipped, variants left out.
        calibration_samples: Pictures that ranges were chosen from.
        duration_s: Wall time of the whole.
        skipped: A message for each picture that was left out.
        searched: The roles whose precision was searched for, as the manifest has them.
    """

    path: Path
    family: str
    variants: tuple[VariantReport, ...]
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
