"""Quality figures in a terminal: as many variants side by side as fit, none cut off."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mmedge.bundle import Bundle
from mmedge.cli.tables import quality_tables

LONG = [
    "fp32",
    "int8-dynamic-equalized",
    "int8-static-mse-equalized-corrected",
    "int4-g64-hqq",
    "int4-g128-gptq",
]


@pytest.mark.parametrize(("width", "counts"), [(80, [2, 2, 1]), (120, [3, 2]), (10_000, [3, 2])])
def test_no_figure_is_cut_off_where_names_are_long(
    tiny_bundle: Bundle, width: int, counts: list[int]
) -> None:
    quality = tiny_bundle.variant("image_encoder", "int8-dynamic").quality
    assert quality is not None
    tables = list(quality_tables("image_encoder", dict.fromkeys(LONG, quality), width))
    assert [len(table.columns) - 1 for table in tables] == counts
    console = Console(file=io.StringIO(), width=width)
    heads: list[str] = []
    for table in tables:
        with console.capture() as capture:
            console.print(table)
        lines = capture.get().splitlines()
        assert max(map(len, lines)) <= width
        (head,) = (line.split()[1:] for line in lines if line.startswith(" image_encoder "))
        heads += head
        (row,) = (line for line in lines if line.startswith(" top-10 overlap "))
        shown = re.findall(r"0\.\d{3} \.\d{3}\N{EN DASH}(?:\.\d{3}|1)(?!\S)", row)
        assert len(shown) == len(head)
    assert heads == LONG


def test_a_terminal_too_narrow_for_two_has_one_variant_a_table(tiny_bundle: Bundle) -> None:
    quality = tiny_bundle.variant("image_encoder", "int8-dynamic").quality
    assert quality is not None
    tables = list(quality_tables("image_encoder", dict.fromkeys(LONG, quality), 40))
    assert len(tables) == len(LONG)
    assert not list(quality_tables("image_encoder", {}, 40))
