"""What the README says of benchmarks is what the recorded runs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_holds_the_figures_of_the_recorded_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "table.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    section = done.stdout.strip()
    assert "| ViT-B/32 image, batch 1 | openvino nncf int8 |" in section
    assert section in (ROOT / "README.md").read_text("utf-8")
