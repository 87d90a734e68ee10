"""Node tables of a bundle, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import add_nodes, edit_manifest
from pydantic import ValidationError

from mmedge.bundle import Bundle, NodeEntry, NodeTable, load_nodes, open_bundle, save_nodes
from mmedge.bundle.nodes import MAX_NODES_BYTES, with_output_errors
from mmedge.errors import IntegrityError, ManifestError

ENTRY = NodeEntry(
    name="tower.layers.0.mlp.fc1",
    op_type="MatMul",
    precision="int8",
    shape=(32, 64),
    low=-2.5,
    high=7.0,
    weight_error=0.004,
)
EXCLUDED = NodeEntry(
    name="projection", op_type="Gemm", precision="float32", shape=(64, 16), reason="most sensitive"
)


def table(**fields: Any) -> NodeTable:
    known: dict[str, Any] = {
        "role": "image_encoder",
        "variant": "int8-dynamic",
        "nodes": (ENTRY, EXCLUDED),
        "samples": 8,
    }
    return NodeTable.model_validate(known | fields)


def test_a_table_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "int8.nodes.json"
    save_nodes(path, table())
    first = path.read_bytes()
    assert load_nodes(path) == table()
    save_nodes(path, load_nodes(path))
    assert path.read_bytes() == first


def test_a_bundle_reads_the_table_of_a_variant_and_has_none_for_others(tiny_bundle: Bundle) -> None:
    bundle = add_nodes(tiny_bundle, table())
    assert bundle.nodes(bundle.variant("image_encoder", "int8-dynamic")) == table()
    assert bundle.nodes(bundle.variant("image_encoder", "fp32")) is None
    # What explains a variant is not part of what it takes to run it.
    before = tiny_bundle.variant("image_encoder", "int8-dynamic").size_bytes
    assert bundle.variant("image_encoder", "int8-dynamic").size_bytes == before


FAULTS: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "unknown field": (("nodes", 0, "color"), "red", "nodes.0.color: unknown field"),
    "text for number": (("nodes", 0, "low"), "1", "nodes.0.low"),
    "low without high": (("nodes", 0, "high"), None, "low and high come together"),
    "low above high": (("nodes", 0, "low"), 8.0, "low 8.0 is above high 7.0"),
    "negative error": (("nodes", 0, "weight_error"), -0.1, "nodes.0.weight_error"),
    "error beyond any cosine": (("nodes", 0, "output_error"), 2.5, "nodes.0.output_error"),
    "no name": (("nodes", 0, "name"), "", "nodes.0.name"),
    "endless name": (("nodes", 0, "name"), "x" * 2000, "nodes.0.name"),
    "odd precision": (("nodes", 0, "precision"), "<b>int8", "nodes.0.precision"),
    "empty weight": (("nodes", 0, "shape"), [0, 4], "nodes.0.shape.0"),
    "three axes": (("nodes", 0, "shape"), [3, 3, 4], "nodes.0.shape"),
    "newer major": (("format_version",), "2.0", "Upgrade mmedge"),
    "no version": (("format_version",), None, "format_version"),
}


@pytest.mark.parametrize(("steps", "value", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_contradictions_are_refused_with_their_place(
    steps: tuple[str | int, ...], value: object, text: str, tiny_bundle: Bundle
) -> None:
    document = table().model_dump(mode="json")
    place: Any = document
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    bundle = add_nodes(tiny_bundle, json.dumps(document).encode())
    with pytest.raises(ManifestError) as caught:
        bundle.nodes(bundle.variant("image_encoder", "int8-dynamic"))
    message = str(caught.value)
    assert text in message
    assert "int8-dynamic.nodes.json" in message


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b'{"format_version": "1.0", "nodes": NaN}', "NaN is not a JSON number"),
        (b'{"format_version": "1.0", "role": "a", "role": "b"}', "'role' appears twice"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[]", "no JSON object"),
        (b" " * (MAX_NODES_BYTES + 1), "expected at most 16384 KiB"),
    ],
    ids=["empty", "encoding", "nan", "twice", "deep", "list", "large"],
)
def test_other_files_are_no_table(data: bytes, text: str, tiny_bundle: Bundle) -> None:
    bundle = add_nodes(tiny_bundle, data)
    with pytest.raises(ManifestError, match=text):
        bundle.nodes(bundle.variant("image_encoder", "int8-dynamic"))


def test_too_many_nodes_are_refused(tmp_path: Path) -> None:
    document = table().model_dump(mode="json")
    document["nodes"] = [document["nodes"][1]] * 20_001
    path = tmp_path / "n.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ManifestError, match="nodes: "):
        load_nodes(path)


@pytest.mark.parametrize(
    "other", [{"variant": "fp32"}, {"role": "text_encoder"}, {"role": "decoder"}], ids=str
)
def test_a_table_of_another_variant_is_not_believed(
    other: dict[str, str], tiny_bundle: Bundle
) -> None:
    bundle = add_nodes(tiny_bundle, table(**other).model_dump_json().encode())
    with pytest.raises(IntegrityError, match=r"describes '\w+'/'[\w-]+', not of"):
        bundle.nodes(bundle.variant("image_encoder", "int8-dynamic"))


def test_a_missing_table_and_one_that_is_not_listed(tiny_bundle: Bundle) -> None:
    bundle = add_nodes(tiny_bundle, table())
    variant = bundle.variant("image_encoder", "int8-dynamic")
    assert variant.nodes is not None
    (bundle.path / variant.nodes).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        bundle.nodes(variant)
    place = ("roles", "text_encoder", "variants", 1, "nodes")
    edit_manifest(bundle.path, *place, value="text_encoder/x.nodes.json")
    with pytest.raises(ManifestError, match="node table of variant text_encoder/int8-dynamic"):
        open_bundle(bundle.path)


def test_measured_errors_are_merged_by_name() -> None:
    twice = with_output_errors((ENTRY, EXCLUDED), {ENTRY.name: 0.25, "elsewhere": 0.5})
    assert [entry.output_error for entry in twice] == [0.25, None]
    assert twice[0].model_copy(update={"output_error": None}) == ENTRY
    # Rounding may carry a cosine beyond 1.
    (entry,) = with_output_errors((ENTRY,), {ENTRY.name: -1e-9})
    assert entry.output_error == 0
    with pytest.raises(ValidationError):
        with_output_errors((ENTRY,), {ENTRY.name: float("inf")})


def test_a_name_is_split_into_block_and_place() -> None:
    def place(name: str) -> tuple[str, str]:
        return EXCLUDED.model_copy(update={"name": name}).place

    assert place("tower.layers.11.mlp.fc1") == ("tower.layers.11", "mlp.fc1")
    assert place("tower.blocks.2.attn.0") == ("tower.blocks.2", "attn.0")
    assert place("projection") == ("", "projection")
