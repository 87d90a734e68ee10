"""`mmedge inspect --nodes`: what became of each node, in a terminal, in a pipe, for machines."""

from __future__ import annotations

import json
import re

import pytest
from bundles import add_nodes
from inspecting import printed, run

from mmedge.bundle import Bundle, NodeEntry, NodeTable

BLOCK = "vision_model.encoder.layers.0"
WHY = "among the 1 most sensitive: its input has outliers that a scale for the tensor cannot hold"


def entry(name: str, **fields: object) -> NodeEntry:
    known: dict[str, object] = {
        "name": name,
        "op_type": "MatMul",
        "precision": "int8",
        "shape": (768, 3072),
        "low": -12.3456,
        "high": 0.16543,
        "weight_error": 0.00651,
        "output_error": 1.2e-5,
    }
    return NodeEntry.model_validate(known | fields)


NODES = (
    entry("vision_model.encoder.layers.0.self_attn.q_proj"),
    entry(
        "vision_model.encoder.layers.0.mlp.fc1",
        precision="float32",
        output_error=0.04,
        reason=WHY,
    ),
    entry("vision_model.encoder.layers.11.self_attn.out_proj"),
    entry("projection", op_type="Gemm", low=None, high=None, output_error=None),
)


def report(bundle: Bundle, nodes: tuple[NodeEntry, ...] = NODES) -> Bundle:
    table = NodeTable(role="image_encoder", variant="int8-dynamic", nodes=nodes, samples=8)
    return add_nodes(bundle, table)


def test_in_a_pipe_each_node_is_one_line_with_all_of_it(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, str(report(tiny_bundle).path), "--nodes")
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    for expected in (
        "image_encoder/int8-dynamic",
        "node op shape format input range w error o error reason",
        f"{BLOCK}.self_attn.q_proj MatMul 768x3072 int8 -12.3..0.165 6.5e-03 1.2e-05",
        f"{BLOCK}.mlp.fc1 MatMul 768x3072 float32 -12.3..0.165 6.5e-03 4.0e-02 {WHY}",
        "projection Gemm 768x3072 int8 - 6.5e-03 -",
        "4 nodes: 3 int8, 1 float32",
    ):
        assert expected in lines
    (worst,) = [line for line in lines if line.startswith("most sensitive: ")]
    assert worst.startswith("most sensitive: vision_model.encoder.layers.0.mlp.fc1,")
    assert "on 8 calibration samples" in lines[-1]
    assert "\x1b" not in text


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_narrow_terminal_groups_by_block_and_loses_nothing(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = printed(capsys, str(report(tiny_bundle).path), "--nodes")
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in text
    assert "vision_model.encoder.layers.0" in lines
    assert "vision_model.encoder.layers.11" in lines
    assert WHY in re.sub(r"\s+", " ", text)
    for figure in ("-12.3..0.165", "6.5e-03", "4.0e-02", "768x3072"):
        assert figure in text
    if columns >= 80:  # a node is a line
        (line,) = [line for line in lines if line.startswith("  self_attn.out_proj")]
        assert line.endswith("1.2e-05")


def test_json_is_the_tables(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(printed(capsys, str(report(tiny_bundle).path), "--nodes", "--json"))
    assert document["path"] == str(tiny_bundle.path)
    (table,) = document["nodes"]
    again = NodeTable.model_validate_json(json.dumps(table), strict=True)
    assert again.nodes == NODES


def test_names_and_reasons_cannot_steer_the_terminal_or_the_markup(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "\x1b]0;owned\x07[red]x[/red]\nforged 1.0 line"
    bundle = report(tiny_bundle, (entry(evil, op_type="\x1b[2J", reason=evil),))
    safe = "\\x1b]0;owned\\x07[red]x[/red]\\nforged 1.0 line"
    for columns in (None, "60"):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        text = printed(capsys, str(bundle.path), "--nodes")
        assert "\x1b" not in text
        assert "\x07" not in text
        assert not any(line.startswith("forged") for line in text.splitlines())
        assert safe.replace(" ", "") in re.sub(r"\s+", "", text)


def test_role_and_variant_choose(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(report(tiny_bundle).path)
    for chosen in (
        ["--role", "image_encoder"],
        ["--variant", "int8-dynamic"],
        ["--variant", "int8"],
        ["--role", "image_encoder", "--variant", "int8"],
    ):
        assert "mlp.fc1" in printed(capsys, path, "--nodes", *chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["--role", "text_encoder"], "no node table of fp32, int8-dynamic"),
        (["--variant", "fp32"], "no node table of fp32"),
        (["--role", "audio"], "has no role 'audio'"),
        (["--variant", "int9"], "has no variant 'int9'"),
        (["--role", "image_encoder", "--variant", "int9"], "has no variant 'int9'"),
    ],
    ids=str,
)
def test_missing_items_are_reported(
    chosen: list[str], message: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, str(report(tiny_bundle).path), "--nodes", *chosen)
    assert code == 1
    assert out == ""
    assert message in re.sub(r"\s+", " ", err)


def test_a_bundle_without_tables_names_the_command_for_them(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, str(tiny_bundle.path), "--nodes")
    assert code == 1
    assert "mmedge convert --explain" in re.sub(r"\s+", " ", err)


def test_a_damaged_table_is_an_error_that_names_it(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, str(add_nodes(tiny_bundle, b"{").path), "--nodes")
    assert code == 1
    assert "int8-dynamic.nodes.json is not JSON" in re.sub(r"\s+", " ", err)


def test_choosing_without_nodes_is_a_misuse(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, str(tiny_bundle.path), "--role", "image_encoder")
    assert code == 2
    assert "--nodes" in err
