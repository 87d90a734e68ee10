"""Puts the examples, which are scripts and not a package, within reach of their tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"

# At the end: a module of an example never stands before an installed one.
if str(SHAPES) not in sys.path:
    sys.path.append(str(SHAPES))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
