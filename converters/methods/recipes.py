"""Recipes: a variant's name as the steps from fp32 to it.

A name is a method and its settings, joined by hyphens, in any order after the method; the canonical
name leaves the defaults out:

| method | settings |
| --- | --- |
| fp32, fp16, bf16 | |
| fp8 | RANGES, half, keepN |
| int8-dynamic | equalized, paired, keepN |
| int8-static | RANGES, symmetric, equalized, corrected, distilled, paired, half, keepN |
| int4, int8-weight | gN, rtn, gptq, hqq, asymmetric, blocked, half, atN, keepN |

RANGES is minmax, percentile, entropy or mse; gN weights share a scale; atN takes layers to half the
bits until the graph is N per cent of fp16 at most; keepN leaves the N most sensitive linear layers
in float; paired weights are for x86 processors without VNNI. For engines are fp8, symmetric and
blocked graphs; half computes non-quantized ops in float16 there, as TensorRT needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, cast, get_args

from mmedge.bundle.manifest import Layout
from mmedge.converters.methods.configs import (
    BFloat16,
    DynamicInt8,
    Equalization,
    Float8,
    Float16,
    QuantizationConfig,
    RangeMethod,
    Rest,
    StaticInt8,
    WeightOnly,
)
from mmedge.errors import ConversionError
from mmedge.specs import Precision, did_you_mean

__all__ = ["FP32", "METHODS", "Recipe", "parse_recipe"]

METHODS = ("fp32", "fp16", "bf16", "fp8", "int8-dynamic", "int8-static", "int8-weight", "int4")
"""Method names, the first part of a recipe's name."""

# Names that the configuration of a conversion resolves before they get here.
_SHORT = ("auto", "int8")
_RANGES: tuple[RangeMethod, ...] = get_args(RangeMethod)
_ROUNDING = ("rtn", "gptq", "hqq")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "fp8": (*_RANGES, "half", "keepN"),
    "int8-dynamic": ("equalized", "paired", "keepN"),
    "int8-static": (
        *_RANGES,
        "symmetric",
        "equalized",
        "corrected",
        "distilled",
        "paired",
        "half",
        "keepN",
    ),
    "int8-weight": ("gN", *_ROUNDING, "asymmetric", "blocked", "half", "atN", "keepN"),
    "int4": ("gN", *_ROUNDING, "asymmetric", "blocked", "half", "atN", "keepN"),
}
_GROUP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """Recipe of one variant.

    Attributes:
        variant: The variant's name.
        precision: What a caller asks for.
        methods: How to quantize the fp32 graph of each layout, the one that runs here first; empty
            for fp32 itself.
        excluded: Number of excluded linear layers, the most sensitive first. Which ones is
            measured, and then recorded in the methods' `keep`.
        distilled: Train the quantized model against fp32 before it is written.
    """

    variant: str
    precision: Precision
    methods: Mapping[Layout, QuantizationConfig]
    excluded: int = 0
    distilled: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe needs calibration data."""
        return (
            self.distilled
            or self.excluded > 0
            or any(_needs_calibration(method) for method in self.methods.values())
        )

    def settings(self) -> dict[str, Any]:
        """Return method and settings as JSON, for the manifest."""
        if not self.methods:
            return {"method": "export"}
        settings: dict[str, Any] = {}
        for layout, method in self.methods.items():
            for name, value in {"method": type(method).__name__, **asdict(method)}.items():
                # Settings that differ by layout are listed for each: the form of static int8.
                shared = settings.setdefault(name, value)
                if shared != value:
                    settings[name] = f"{shared}, {value} ({layout})"
        for names in ("keep", "lowered"):
            if names in settings:
                settings[names] = list(settings[names])
        return settings | ({"distilled": True} if self.distilled else {})


def _needs_calibration(method: QuantizationConfig) -> bool:
    if isinstance(method, DynamicInt8):
        return method.equalization is not None
    if isinstance(method, WeightOnly):
        return method.rounding == "gptq" or method.at_most is not None
    return isinstance(method, StaticInt8 | Float8)


FP32 = Recipe("fp32", Precision.FP32, {})
"""The source and reference of every other variant."""


def parse_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        ConversionError: If the name holds no known method, or a setting that it does not take.
        QuantizationError: If the settings do not go together.
    """
    method = next((m for m in METHODS if name == m or name.startswith(f"{m}-")), None)
    if method is None:
        raise ConversionError(
            f"Unknown precision: got '{name}', expected {', '.join((*_SHORT, *METHODS))}. Most "
            "methods take settings, as in int8-static-mse-equalized or int4-g64-gptq."
            + did_you_mean(name, (*_SHORT, *METHODS))
        )
    settings = [part for part in name[len(method) + 1 :].split("-") if part]
    taken = _SETTINGS.get(method, ())
    for setting in settings:
        kind = re.sub(r"[0-9]+$", "N", setting)
        if kind not in taken or (setting == kind and kind.endswith("N")):
            raise ConversionError(
                f"Precision '{name}': {method} takes no setting '{setting}', but "
                f"{', '.join(taken) or 'none at all'}." + did_you_mean(setting, taken)
            )
    excluded = _number(name, settings, "keep", 0)
    build = {"int8-static": _static, "int8-dynamic": _dynamic, "fp8": _fp8}.get(method)
    if build is not None:
        parts, precision, methods = build(settings)
    elif method in {"int4", "int8-weight"}:
        parts, precision, methods = _weight_only(name, method, settings)
    else:
        parts, precision, methods = _plain(method)
    if excluded:
        parts.append(f"keep{excluded}")
    return Recipe("-".join([method, *parts]), precision, methods, excluded, "distilled" in settings)


_Default = TypeVar("_Default", int, None)
_Made = tuple[list[str], Precision, dict[Layout, QuantizationConfig]]


def _plain(method: str) -> _Made:
    if method == "fp32":
        return [], Precision.FP32, {}
    half: QuantizationConfig = Float16() if method == "fp16" else BFloat16()
    return [], Precision(method), {"portable": half}


def _dynamic(settings: list[str]) -> _Made:
    config = DynamicInt8(equalization=_equalization(settings), paired="paired" in settings)
    return _select(settings, "equalized", "paired"), Precision.INT8, {"onnxruntime": config}


def _static(settings: list[str]) -> _Made:
    ranges = _one_of(settings, _RANGES)
    parts = [] if ranges == "minmax" else [ranges]
    parts += _select(settings, "symmetric", "equalized", "corrected", "distilled", "paired", "half")
    shared: dict[str, Any] = {
        "ranges": ranges,
        "bias_correction": "corrected" in settings,
        "equalization": _equalization(settings),
        "rest": _rest(settings),
        "paired": "paired" in settings,
    }
    if "symmetric" in settings:
        only = StaticInt8(form="qdq", activations="int8", **shared)
        return parts, Precision.INT8, {"portable": only}
    return (
        parts,
        Precision.INT8,
        {"onnxruntime": StaticInt8(**shared), "portable": StaticInt8(form="qdq", **shared)},
    )


def _fp8(settings: list[str]) -> _Made:
    ranges = cast(RangeMethod, _one_of(settings, _RANGES))
    parts: list[str] = [] if ranges == "minmax" else [ranges]
    parts += _select(settings, "half")
    return parts, Precision.FP8, {"portable": Float8(ranges, _rest(settings))}


def _weight_only(name: str, method: str, settings: list[str]) -> _Made:
    group_size = _number(name, settings, "g", _GROUP_SIZE)
    rounding = cast(Literal["rtn", "gptq", "hqq"], _one_of(settings, _ROUNDING))
    blocked = "blocked" in settings
    percent = _number(name, settings, "at", None)
    config = WeightOnly(
        bits=4 if method == "int4" else 8,
        group_size=group_size,
        symmetric="asymmetric" not in settings and rounding != "hqq",
        rounding=rounding,
        form="blocked" if blocked else "operators",
        rest=_rest(settings),
        at_most=None if percent is None else percent / 100,
    )
    parts = [] if group_size == _GROUP_SIZE else [f"g{group_size}"]
    parts += [] if rounding == "rtn" else [rounding]
    parts += [] if rounding == "hqq" else _select(settings, "asymmetric")
    parts += _select(settings, "blocked", "half")
    parts += [] if percent is None else [f"at{percent}"]
    layout: Layout = "portable" if blocked else "onnxruntime"
    return parts, Precision.INT4 if method == "int4" else Precision.INT8, {layout: config}


def _rest(settings: list[str]) -> Rest:
    return "float16" if "half" in settings else "float32"


def _select(settings: list[str], *names: str) -> list[str]:
    return [name for name in names if name in settings]


def _one_of(settings: list[str], names: tuple[str, ...]) -> Any:  # noqa: ANN401, one of the names
    """Return the name among the settings, else the first name."""
    found = _select(settings, *names)
    if len(found) > 1:
        raise ConversionError(f"Precision: {' and '.join(found)} exclude each other. Name one.")
    return found[0] if found else names[0]


def _number(name: str, settings: list[str], word: str, default: _Default) -> int | _Default:
    matches = [re.fullmatch(rf"{word}([0-9]+)", setting) for setting in settings]
    found = {int(match[1]) for match in matches if match is not None}
    if len(found) > 1:
        raise ConversionError(f"Precision '{name}': {word} is given twice. Name one.")
    return found.pop() if found else default


def _equalization(settings: list[str]) -> Equalization | None:
    return Equalization() if "equalized" in settings else None
