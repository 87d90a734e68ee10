"""Recipes by name, and wrong names."""

from __future__ import annotations

import json

import pytest

from mmedge.converters.methods.configs import (
    BFloat16,
    DynamicInt8,
    Equalization,
    Float8,
    Float16,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.methods.recipes import FP32, METHODS, parse_recipe
from mmedge.errors import ConversionError, QuantizationError
from mmedge.specs import Precision

EQUALIZED = Equalization()
CANONICAL: dict[str, tuple[Precision, dict[str, QuantizationConfig]]] = {
    "fp32": (Precision.FP32, {}),
    "fp16": (Precision.FP16, {"portable": Float16()}),
    "bf16": (Precision.BF16, {"portable": BFloat16()}),
    "fp8": (Precision.FP8, {"portable": Float8()}),
    "fp8-entropy-keep2": (Precision.FP8, {"portable": Float8("entropy")}),
    "int8-dynamic": (Precision.INT8, {"onnxruntime": DynamicInt8()}),
    "int8-dynamic-equalized": (Precision.INT8, {"onnxruntime": DynamicInt8(EQUALIZED)}),
    "int8-dynamic-equalized-paired-keep2": (
        Precision.INT8,
        {"onnxruntime": DynamicInt8(EQUALIZED, paired=True)},
    ),
    "int8-static-mse-paired": (
        Precision.INT8,
        {
            "onnxruntime": StaticInt8(ranges="mse", paired=True),
            "portable": StaticInt8(form="qdq", ranges="mse", paired=True),
        },
    ),
    "int8-static": (
        Precision.INT8,
        {"onnxruntime": StaticInt8(), "portable": StaticInt8(form="qdq")},
    ),
    "int8-static-mse-equalized-corrected": (
        Precision.INT8,
        {
            "onnxruntime": StaticInt8(ranges="mse", bias_correction=True, equalization=EQUALIZED),
            "portable": StaticInt8(
                form="qdq", ranges="mse", bias_correction=True, equalization=EQUALIZED
            ),
        },
    ),
    "int8-static-percentile-symmetric": (
        Precision.INT8,
        {"portable": StaticInt8(form="qdq", activations="int8", ranges="percentile")},
    ),
    "int8-weight": (Precision.INT8, {"onnxruntime": WeightOnly(bits=8)}),
    "int8-weight-g128": (Precision.INT8, {"onnxruntime": WeightOnly(bits=8, group_size=128)}),
    "int4": (Precision.INT4, {"onnxruntime": WeightOnly()}),
    "int4-g64-gptq-asymmetric": (
        Precision.INT4,
        {"onnxruntime": WeightOnly(group_size=64, rounding="gptq", symmetric=False)},
    ),
    "int4-hqq": (Precision.INT4, {"onnxruntime": WeightOnly(rounding="hqq", symmetric=False)}),
    "int4-g128-gptq-at25": (
        Precision.INT4,
        {"onnxruntime": WeightOnly(group_size=128, rounding="gptq", at_most=0.25)},
    ),
    "int8-weight-at40-keep2": (
        Precision.INT8,
        {"onnxruntime": WeightOnly(bits=8, at_most=0.4)},
    ),
    "int4-blocked": (Precision.INT4, {"portable": WeightOnly(form="blocked")}),
}


@pytest.mark.parametrize("name", CANONICAL)
def test_a_canonical_name_is_its_own_variant(name: str) -> None:
    recipe = parse_recipe(name)
    precision, methods = CANONICAL[name]
    assert (recipe.variant, recipe.precision) == (name, precision)
    assert dict(recipe.methods) == methods
    assert json.loads(json.dumps(recipe.settings())) == recipe.settings()


@pytest.mark.parametrize(
    ("spelled", "canonical"),
    [
        ("int8-static-minmax", "int8-static"),
        ("int8-static-corrected-equalized-mse", "int8-static-mse-equalized-corrected"),
        ("int8-static-keep4-entropy", "int8-static-entropy-keep4"),
        ("int8-dynamic-keep0", "int8-dynamic"),
        ("int8-dynamic-keep007", "int8-dynamic-keep7"),
        ("int4-g32-rtn", "int4"),
        ("int4-gptq-g128-asymmetric", "int4-g128-gptq-asymmetric"),
        ("int4-hqq-asymmetric", "int4-hqq"),
        ("int4-at25-keep2-gptq-g64", "int4-g64-gptq-at25-keep2"),
        ("int4-at025", "int4-at25"),
        ("int8-weight-keep2-blocked-g16", "int8-weight-g16-blocked-keep2"),
        ("fp8-minmax", "fp8"),
    ],
)
def test_order_and_defaults_do_not_matter(spelled: str, canonical: str) -> None:
    recipe = parse_recipe(spelled)
    assert recipe.variant == canonical
    assert recipe == parse_recipe(canonical)


def test_the_recipe_has_excluded_layers_and_training() -> None:
    recipe = parse_recipe("int8-static-mse-distilled-keep3")
    assert (recipe.excluded, recipe.distilled) == (3, True)
    assert recipe.settings()["distilled"] is True
    assert (FP32.excluded, FP32.distilled, FP32.settings()) == (0, False, {"method": "export"})


def test_settings_show_where_layouts_differ() -> None:
    settings = parse_recipe("int8-static-equalized").settings()
    assert settings["method"] == "StaticInt8"
    assert settings["form"] == "operators, qdq (portable)"
    assert settings["equalization"] == {"strength": None}
    assert settings["keep"] == []


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("fp32", False),
        ("fp16", False),
        ("bf16", False),
        ("fp8", True),
        ("int8-dynamic", False),
        ("int8-dynamic-equalized", True),
        ("int8-dynamic-paired", False),
        ("int8-dynamic-keep1", True),
        ("int8-static", True),
        ("int8-weight", False),
        ("int4-hqq", False),
        ("int4-gptq", True),
        ("int4-keep1", True),
        ("int4-at25", True),
    ],
)
def test_what_needs_calibration(name: str, needs: bool) -> None:
    assert parse_recipe(name).needs_calibration is needs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "Unknown precision: got 'int3', expected auto, int8, fp32"),
        ("int8-statik", "Did you mean int8-static or"),
        ("", "Unknown precision: got ''"),
        ("fp16-keep2", "fp16 takes no setting 'keep2', but none at all"),
        ("fp32-minmax", "fp32 takes no setting 'minmax'"),
        ("int8-dynamic-mse", "int8-dynamic takes no setting 'mse', but equalized, paired, keepN"),
        ("int8-static-equalised", "Did you mean equalized?"),
        ("int8-static-g32", "takes no setting 'g32'"),
        ("int4-keep", "takes no setting 'keep'"),
        ("int4-keepN", "takes no setting 'keepN'"),
        ("int4-gN", "takes no setting 'gN'"),
        ("int4-atN", "takes no setting 'atN'"),
        ("int8-static-at25", "takes no setting 'at25'"),
        ("int4-at25-at30", "at is given twice"),
        ("int4-g-32", "takes no setting 'g'"),
        ("int4-keep-2", "takes no setting 'keep'"),
        ("int4-rtn-hqq", "rtn and hqq exclude each other"),
        ("int8-static-mse-entropy", "entropy and mse exclude each other"),
        ("int4-g64-g128", "g is given twice"),
        ("int8-static-keep1-keep2", "keep is given twice"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConversionError) as refused:
        parse_recipe(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pairing_is_for_unsigned_activations() -> None:
    with pytest.raises(QuantizationError, match="Paired weights are for CPUs: got signed"):
        parse_recipe("int8-static-symmetric-paired")


@pytest.mark.parametrize("size", [0, 8, 48])
def test_a_group_that_no_runtime_takes_is_refused(size: int) -> None:
    with pytest.raises(QuantizationError, match=f"group_size: got {size}"):
        parse_recipe(f"int4-g{size}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4-at0", "at_most: got 0, expected a share"),
        ("int4-at100", "at_most: got 1, expected a share"),
        ("int4-blocked-at25", "got the blocked form, which has no 2 bits"),
    ],
)
def test_a_size_target_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        parse_recipe(name)


def test_every_method_has_a_name() -> None:
    assert {name.split("-keep")[0] for name in CANONICAL} >= set(METHODS) - {"int8-static"}
