"""Puts the examples, which are scripts and not a package, within reach of their tests."""

from __future__ import annotations

import sys
from pathlib import Path

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"

# At the end: a module of an example never stands before an installed one.
if str(SHAPES) not in sys.path:
    sys.path.append(str(SHAPES))
