"""What is asked of a conversion, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mmedge.bundle.manifest import Layout, Parity, Quality
from mmedge.converters.quantize import DynamicInt8, Float16, QuantizationConfig, StaticInt8
from mmedge.errors import ConversionError
from mmedge.specs import Precision, did_you_mean

__all__ = [
    "FP32",
    "PRECISIONS",
    "TARGETS",
    "ConversionReport",
    "ConvertConfig",
    "Progress",
    "ProgressEvent",
    "Recipe",
    "VariantReport",
    "recipes",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one variant is made from fp32.

    Attributes:
        variant: The variant's name.
        precision: What a caller asks for.
        methods: How to quantize the fp32 graph of each layout, the one that ONNX Runtime runs here
            first; empty for fp32 itself.
    """

    variant: str
    precision: Precision
    methods: Mapping[Layout, QuantizationConfig]

    @property
    def needs_calibration(self) -> bool:
        """Whether the method needs calibration data."""
        return any(isinstance(method, StaticInt8) for method in self.methods.values())

    def settings(self) -> dict[str, Any]:
        """Return method and settings as JSON, for the manifest."""
        if not self.methods:
            return {"method": "export"}
        settings: dict[str, Any] = {}
        for layout, method in self.methods.items():
            for name, value in {"method": type(method).__name__, **asdict(method)}.items():
                # What the layouts do not share is told for each: the form of static int8.
                shared = settings.setdefault(name, value)
                if shared != value:
                    settings[name] = f"{shared}, {value} ({layout})"
        return settings


FP32 = Recipe("fp32", Precision.FP32, {})
"""What every other variant is made from and compared with."""
_RECIPES = (
    FP32,
    Recipe("fp16", Precision.FP16, {"portable": Float16()}),
    Recipe("int8-dynamic", Precision.INT8, {"onnxruntime": DynamicInt8()}),
    Recipe(
        "int8-static",
        Precision.INT8,
        {"onnxruntime": StaticInt8(), "portable": StaticInt8(form="qdq")},
    ),
)
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic", "int8-static")
"""What `--precision` takes; "int8" is int8-dynamic, and with calibration data int8-static too."""
TARGETS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and to what.

    Attributes:
        source: A folder, or a hub id.
        out: The bundle to write; its name ends in ".mmedge".
        precisions: Names in PRECISIONS.
        revision: Branch, tag or commit of a hub repository.
        calibration: Pictures (and captions) to choose ranges from.
        evaluate: Pictures with captions or labels to measure quality on; never the calibration
            data. None measures on synthetic samples.
        target: What the layouts are made for.
        template: How a label becomes a text for zero-shot accuracy, "{}" standing for the label.
        overwrite: Replace the bundle that stands at `out`.
        skip_bad: Leave unreadable pictures out instead of stopping.
        seed: Of everything that is drawn.
    """

    source: str
    out: Path
    precisions: tuple[str, ...] = ("fp32",)
    revision: str | None = None
    calibration: Path | None = None
    evaluate: Path | None = None
    target: str = "cpu"
    template: str = "a photo of a {}"
    overwrite: bool = False
    skip_bad: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or not self.precisions:
            raise ConversionError(
                f"Unknown precision: got '{', '.join(unknown)}', expected one or more of "
                f"{', '.join(PRECISIONS)}."
                + "".join(did_you_mean(name, PRECISIONS) for name in unknown)
            )
        if self.target not in TARGETS:
            raise ConversionError(
                f"Unknown target: got '{self.target}', expected one of {', '.join(TARGETS)}."
            )
        if self.target != "cpu":
            raise ConversionError(
                f"Layouts for '{self.target}' are not built yet. Use --target cpu: its fp32 and "
                "fp16 variants also hold a portable graph that runs on other devices."
            )
        if "int8-static" in self.precisions and self.calibration is None:
            raise ConversionError(
                "int8-static needs calibration data. Pass --calibration FOLDER with pictures like "
                "those that the device will see (and captions.jsonl for the text encoder)."
            )
        if "{}" not in self.template:
            raise ConversionError(
                f"Template '{self.template}' has no place for the label. Put {{}} there, as in "
                f"'{ConvertConfig.template}'."
            )


def recipes(config: ConvertConfig) -> tuple[Recipe, ...]:
    """Return the recipes that a configuration asks for, highest fidelity first."""
    wanted = set(config.precisions)
    if "int8" in wanted:
        wanted.add("int8-dynamic")
        if config.calibration is not None:
            wanted.add("int8-static")
    return tuple(recipe for recipe in _RECIPES if recipe.variant in wanted)


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Where a conversion stands.

    Attributes:
        stage: What is being done ("Export image_encoder").
        done: Steps done of this stage.
        total: Steps of this stage, at least 1.
    """

    stage: str
    done: int
    total: int


Progress: TypeAlias = Callable[[ProgressEvent], None]


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
    """

    path: Path
    family: str
    variants: tuple[VariantReport, ...]
    notes: tuple[str, ...]
    calibration_samples: int
    duration_s: float
    skipped: tuple[str, ...] = field(default=())

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
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "calibration_samples": self.calibration_samples,
            "duration_s": round(self.duration_s, 3),
        }
