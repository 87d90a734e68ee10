"""Conversion settings: precisions by role, and options for a search only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmedge.converters.config import ConvertConfig, recipes
from mmedge.errors import ConversionError

ROLES = ("image_encoder", "text_encoder")


def asked(*precisions: str, **others: Any) -> ConvertConfig:
    return ConvertConfig("m", Path("x.mmedge"), precisions, **others)


def names(config: ConvertConfig, role: str) -> list[str]:
    return [recipe.variant for recipe in recipes(config, role)]


def test_a_role_has_its_own_precisions_and_others_the_common_ones(tmp_path: Path) -> None:
    config = asked("fp32", "int8", "text_encoder:fp16", calibration=tmp_path)
    config.require_roles(ROLES)
    assert names(config, "image_encoder") == ["fp32", "int8-dynamic", "int8-static"]
    assert names(config, "text_encoder") == ["fp16"]
    assert [r.variant for r in recipes(config)] == ["fp32", "fp16", "int8-dynamic", "int8-static"]


def test_every_role_may_have_its_own() -> None:
    config = asked("image_encoder:int8-dynamic", "text_encoder:fp16", "text_encoder:fp32")
    config.require_roles(ROLES)
    assert names(config, "image_encoder") == ["int8-dynamic"]
    assert names(config, "text_encoder") == ["fp32", "fp16"]


def test_a_role_that_the_model_lacks_is_named_with_those_it_has() -> None:
    config = asked("fp32", "image_encodr:fp16")
    with pytest.raises(ConversionError, match=r"no role 'image_encodr', but image_encoder, text_"):
        config.require_roles(ROLES)
    with pytest.raises(ConversionError, match="no role ''"):
        asked("fp32", ":fp16").require_roles(ROLES)


def test_a_role_without_a_precision_is_named() -> None:
    config = asked("image_encoder:fp16")
    with pytest.raises(ConversionError, match=r"No precision for text_encoder: .*:fp32"):
        config.require_roles(ROLES)


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        (("image_encoder:int3",), "Unknown precision: got 'int3'"),
        (("image_encoder:",), "Unknown precision: got ''"),
        (("image_encoder:int8-static",), "int8-static needs calibration"),
        (("image_encoder:auto", "text_encoder:fp16"), "auto cannot be combined"),
    ],
)
def test_a_precision_of_a_role_is_checked_as_any(precisions: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        asked(*precisions)


@pytest.mark.parametrize(
    ("others", "option"),
    [
        ({"max_drop": 0.02}, "--max-drop"),
        ({"metric": "recall@1"}, "--metric"),
        ({"objective": "size"}, "--objective"),
    ],
)
def test_a_budget_without_a_search_is_refused(others: dict[str, Any], option: str) -> None:
    with pytest.raises(ConversionError, match=rf"^{option}: for --precision auto.*'fp32,int8'"):
        asked("fp32", "int8", **others)
    assert asked("auto", **others).searches


@pytest.mark.parametrize(
    ("precisions", "default", "message"),
    [
        (("fp32", "fp16"), "int8", r"--default: got 'int8', expected one of .*fp32, fp16"),
        (("fp32", "int8"), "int8-dynamc", r"Did you mean int8-dynamic\?"),
        (("auto",), "fp16", "--default fp16: precision auto chooses the default itself"),
    ],
)
def test_a_default_that_is_not_made_is_refused_before_any_work(
    precisions: tuple[str, ...], default: str, message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        asked(*precisions, default=default)


@pytest.mark.parametrize(
    ("default", "image", "text"),
    [
        ("int8", "int8", "int8"),
        ("int8, text:fp32", "int8", "fp32"),
        ("text:int8-dynamic", None, "int8-dynamic"),
    ],
)
def test_a_default_can_be_named_for_one_role(
    default: str, image: str | None, text: str | None
) -> None:
    config = asked("fp32", "int8", default=default)
    config.require_roles(("image", "text"))
    assert (config.default_of("image"), config.default_of("text")) == (image, text)


def test_a_default_names_an_existing_role() -> None:
    with pytest.raises(ConversionError, match=r"'txt:int8': the model has no role 'txt'.*text\?"):
        asked("int8", default="txt:int8").require_roles(("image", "text"))


@pytest.mark.parametrize("default", ["int8", "int8-dynamic"])
def test_a_default_is_a_variant_or_a_precision(default: str) -> None:
    assert asked("fp32", "int8", default=default).default == default


def test_paths_may_be_strings() -> None:
    config = asked("fp32", calibration="a", evaluate="b")
    assert (config.calibration, config.evaluate) == (Path("a"), Path("b"))
