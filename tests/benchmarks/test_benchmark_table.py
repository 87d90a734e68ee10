"""What the documents say of benchmarks is what the recorded runs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("document", "row"),
    [
        ("README.md", "| ViT-B/32 image, batch 1 | 0.95 | 0.87 |"),
        ("docs/benchmarks.md", "| mmedge int8 |"),
        ("docs/cpu-speed.md", "| ViT-B/32 image, batch 1 | onnxruntime quantize_dynamic |"),
        ("docs/cpu-speed.md", "| EVA-02-CLIP B/16 | 1, 1 |"),
        ("docs/retrieval.md", "| 16 | 20 a second | compacts |"),
        ("docs/scale.md", "| 10^9 | HNSW fp32 |"),
        ("docs/weight-only.md", "| int4-g128-gptq-at25 |"),
    ],
)
def test_documents_hold_the_figures_of_the_recorded_runs(document: str, row: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "table.py", document],
        capture_output=True,
        text=True,
        check=True,
    )
    section = done.stdout.strip()
    assert row in section
    assert section in (ROOT / document).read_text("utf-8")
