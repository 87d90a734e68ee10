"""Which graphs are exported, and warnings about the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import InputError
from mmedge.exports import select


def relayout(bundle: Bundle, variant: int, layout: str, role: str = "image_encoder") -> Bundle:
    """Call a variant's only graph by another layout."""
    name = bundle.role(role).variants[variant].models["portable"]
    steps = ("roles", role, "variants", variant, "models")
    edit_manifest(bundle.path, *steps, value={layout: name})
    return open_bundle(bundle.path)


def names(bundle: Bundle, **wanted: object) -> list[tuple[str, str, str]]:
    chosen = select(bundle, **wanted)  # type: ignore[arg-type]
    return [(each.role, each.variant.name, each.layout) for each in chosen]


def test_the_default_of_every_role(tiny_bundle: Bundle) -> None:
    assert names(tiny_bundle) == [
        ("image_encoder", "fp32", "portable"),
        ("text_encoder", "fp32", "portable"),
    ]
    edit_manifest(tiny_bundle.path, "roles", "text_encoder", "default", value="int8-dynamic")
    assert names(open_bundle(tiny_bundle.path))[1] == ("text_encoder", "int8-dynamic", "portable")


def test_roles_and_precisions(tiny_bundle: Bundle) -> None:
    assert names(tiny_bundle, roles=["text_encoder"], precisions=["int8", "fp32", "int8"]) == [
        ("text_encoder", "int8-dynamic", "portable"),
        ("text_encoder", "fp32", "portable"),
    ]


def test_a_default_that_cannot_be_exported_is_replaced_with_a_warning(
    tiny_bundle: Bundle,
) -> None:
    edit_manifest(tiny_bundle.path, "roles", "image_encoder", "default", value="int8-dynamic")
    bundle = relayout(tiny_bundle, 1, "onnxruntime")
    image, text = select(bundle)
    assert image.variant.name == "fp32"
    assert "in place of the default int8-dynamic" in image.note
    assert text.note == ""
    assert select(bundle, layouts=("portable", "onnxruntime"))[0].layout == "onnxruntime"


def test_a_precision_passes_over_variants_that_cannot_be_exported(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """int8 asks for the best int8 variant that has a portable graph, not for the first."""
    relative = "image_encoder/int8-static.onnx"
    shutil.copyfile(
        tiny_bundle.file("image_encoder/int8-dynamic.onnx"), tiny_bundle.path / relative
    )
    document = tiny_bundle.manifest.model_dump(mode="json")
    entry = document["files"]["image_encoder/int8-dynamic.onnx"]
    edit_manifest(tiny_bundle.path, "files", value=document["files"] | {relative: entry})
    variants = document["roles"]["image_encoder"]["variants"]
    static = variants[1] | {"name": "int8-static", "models": {"portable": relative}}
    static |= {"files": [relative]}
    variants[1]["models"] = {"onnxruntime": variants[1]["models"]["portable"]}
    edit_manifest(tiny_bundle.path, "roles", "image_encoder", "variants", value=[*variants, static])
    bundle = open_bundle(tiny_bundle.path)
    assert names(bundle, roles=["image_encoder"], precisions=["int8"]) == [
        ("image_encoder", "int8-static", "portable")
    ]


def test_a_precision_without_a_portable_graph_is_an_error_with_a_fix(
    tiny_bundle: Bundle,
) -> None:
    bundle = relayout(relayout(tiny_bundle, 1, "onnxruntime"), 1, "onnxruntime", "text_encoder")
    with pytest.raises(InputError) as caught:
        select(bundle, precisions=["int8"])
    assert "'int8' has no graph in the layout portable" in str(caught.value)
    assert "--target tensorrt" in str(caught.value)


def test_a_role_without_anothers_variant_is_not_left_out_silently(
    tiny_bundle: Bundle,
) -> None:
    bundle = relayout(tiny_bundle, 1, "onnxruntime")
    with pytest.raises(InputError, match="role 'image_encoder' has none of"):
        select(bundle, precisions=["int8"])
    assert names(bundle, roles=["text_encoder"], precisions=["int8"])


def test_a_role_without_any_graph_that_can_be_exported(tiny_bundle: Bundle) -> None:
    bundle = relayout(relayout(tiny_bundle, 0, "onnxruntime"), 1, "onnxruntime")
    with pytest.raises(InputError, match="no variant of role 'image_encoder' has a graph"):
        select(bundle)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [({"precisions": ["int4"]}, "no variant 'int4'"), ({"roles": ["audio"]}, "no role 'audio'")],
)
def test_wrong_names_list_the_right_ones(
    tiny_bundle: Bundle, wanted: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        names(tiny_bundle, **wanted)
    assert message in str(caught.value)
    assert "image_encoder" in str(caught.value)
