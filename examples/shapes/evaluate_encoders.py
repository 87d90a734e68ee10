"""Measure the trained models on unseen scenes, through their bundles, in fp32 and in int8.

    python examples/shapes/evaluate_encoders.py --seed 7 --count 500 --json

Each model is converted here; calibration and the conversion's own judgement take scenes of the
calibration split, the figures scenes of the test split. Exit code 1 if a goal is missed, or a
negative control (a copy that quantizes badly) went unnoticed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from clap_rows import clap_rows
from detector_rows import detector_rows
from encoder_rows import Row, clip_rows

MODELS: Mapping[str, Callable[[int, int, Path], list[Row]]] = {
    "clip": clip_rows,
    "detector": detector_rows,
    "clap": clap_rows,
}
"""Of each model, the function of seed, count and work folder that measures it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the trained models through bundles.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="scenes of the test split")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--work", type=Path, help="keep bundles and scenes in this folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = [row for name in options.models for row in MODELS[name](
            options.seed, options.count, work / name
        )]  # fmt: skip
    if options.json:
        report = {"split": "test", "seed": options.seed, "rows": [row.to_json() for row in rows]}
        print(json.dumps(report, indent=2))
    else:
        print(f"{'model':18}{'figure':22}{'variant':14}{'fp32':>8}{'int8':>8}{'goal':>6}  passed")
        for row in rows:
            goal, passed = ("", "") if row.goal is None else (f"{row.goal:.2f}", str(row.passed))
            print(
                f"{row.model:18}{row.figure:22}{row.variant:14}{row.fp32:8.4f}{row.int8:8.4f}"
                f"{goal:>6}  {passed}"
            )
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
