"""From a trained CLIP in PyTorch to text search with an int8 bundle, every step shown.

    make demo            # or: python examples/demo.py --output demo-output

Everything is written under the output folder: a gallery of scenes, the bundle, the profile and
`search.png`, the contact sheet of what the int8 bundle found. The commands are the public ones,
printed as one would type them; the search is a few lines of Python.
"""

# ruff: noqa: E402, the test world is a folder of scripts, which the path must name first
from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mmedge

SHAPES = Path(__file__).resolve().parent / "shapes"
sys.path.insert(0, str(SHAPES))

from contact_sheet import Hit, Row, draw_contact_sheet
from generate import captioned
from metrics import recall_at_k
from queries import Query, queries_about

from mmedge.specs import Float32Array

GALLERY_COUNT = 300
CALIBRATION_COUNT = 128
HITS = 5


def main() -> None:
    """Run every step."""
    parser = argparse.ArgumentParser(description="Convert, verify, profile and search.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--model", type=Path, default=SHAPES / "clip", help="a CLIP's folder")
    arguments = parser.parse_args()
    output: Path = arguments.output
    started = time.monotonic()
    if not (arguments.model / "model.safetensors").is_file():
        sys.exit(f"{arguments.model} has no weights. Train them: examples/shapes/train_clip.py")
    output.mkdir(parents=True, exist_ok=True)
    source = os.path.relpath(arguments.model)
    gallery, calibration = output / "gallery", output / "calibration"
    bundle = output / "shapes-clip.mmedge"

    heading("A gallery of scenes that the model has never seen, and others to calibrate with")
    generate = os.path.relpath(SHAPES / "generate.py")
    run("python", generate, "--split", "test", "--count", GALLERY_COUNT, "--out", gallery)
    run("python", generate, "--split", "calibration", "--count", CALIBRATION_COUNT,
        "--out", calibration)  # fmt: skip

    heading("Convert: PyTorch to ONNX to int8, each variant measured against the original")
    run("mmedge", "convert", source, "-o", bundle, "--precision", "fp32,int8",
        "--calibration", calibration, "--evaluate", gallery, "--overwrite")  # fmt: skip

    heading("Verify: do this machine's outputs match the golden vectors?")
    run("mmedge", "verify", bundle)

    heading("Profile both variants")
    run("mmedge", "profile", bundle, "--precision", "fp32,int8", "--batch", "1,8", "--seconds", 1,
        "--html", output / "profile.html", "--json", output / "profile.json")  # fmt: skip

    heading("Search the gallery by text, without torch")
    scenes = captioned("test", GALLERY_COUNT)  # the same that generate.py wrote, with their truth
    images = sorted(gallery.glob("*.png"))
    captions = [text for _, text in scenes]
    queries = queries_about(scenes)
    rows, recalls = [], {}
    for precision in ("fp32", "int8"):
        with mmedge.DualEncoder.load(bundle, precision=precision) as model:
            vectors = model.encode_image(images)
            found = model.encode_text(captions)
            recalls[precision] = [recall_at_k(found, vectors, k) for k in (1, 5)]
            if precision == "int8":
                similarities = model.encode_text([query.text for query in queries]) @ vectors.T
                rows = [
                    judge(query, scores, images, captions)
                    for query, scores in zip(queries, similarities, strict=True)
                ]
    print_rows(rows)
    print(f"\nEach of the {len(captions)} captions as a query: is its own image found?")
    for precision, (at_1, at_5) in recalls.items():
        print(f"  {precision}: first hit {at_1:.1%}, among the first five {at_5:.1%}")

    sheet = output / "search.png"
    at_1, at_5 = recalls["int8"]
    draw_contact_sheet(
        "Text search with the int8 bundle",
        f"{len(images)} unseen images. All captions as queries: own image first {at_1:.1%}, "
        f"among the first five {at_5:.1%} (fp32: {recalls['fp32'][0]:.1%}, "
        f"{recalls['fp32'][1]:.1%}).",
        rows,
    ).save(sheet)
    heading("Keep the gallery in an index, and search that")
    index = output / "gallery.index"
    hits = output / "index-search.png"
    run("mmedge", "index", "add", gallery, "-m", bundle, "-o", index, "--precision", "int8")
    run("mmedge", "search", index, queries[0].text, "-k", HITS, "--sheet", hits)
    heading(f"Done in {time.monotonic() - started:.0f} s. Look at")
    print(f"  {sheet}\n  {hits}\n  {output / 'profile.html'}\n  mmedge inspect {bundle}")


def heading(text: str) -> None:
    """Print a step's heading."""
    print(f"\n--- {text}", flush=True)


def run(command: str, *arguments: str | int | Path) -> None:
    """Print a command as one would type it, run it, and stop the demo if it fails."""
    line = [str(argument) for argument in arguments]
    print(f"$ {shlex.join([command, *line])}", flush=True)
    program = Path(sys.executable).parent / command  # the environment need not be active
    code = subprocess.run([program, *line], check=False).returncode  # noqa: S603, our own commands
    if code:
        sys.exit(f"'{command} {line[0]}' ended with exit code {code}; the demo stops here.")


def judge(
    query: Query, scores: Float32Array, images: Sequence[Path], captions: Sequence[str]
) -> Row:
    """Return the best hits of a query, each with its result.

    Args:
        query: The query and the images that answer it.
        scores: (N,) similarity of every image.
        images: N files.
        captions: N captions.
    """
    hits: list[Hit] = []
    found = 0
    for index in np.argsort(-scores, kind="stable")[:HITS].tolist():
        right = index in query.relevant
        done = found == len(query.relevant)
        result = "right" if right else "none left" if done else "wrong"
        found += right
        hits.append(Hit(images[index], captions[index], float(scores[index]), result))
    count = len(query.relevant)
    note = f"{query.kind}; {count} right image{'s' if count > 1 else ''} in the gallery"
    return Row(query.text, note, hits)


def print_rows(rows: Sequence[Row]) -> None:
    """Print queries with their hits, best first."""
    for row in rows:
        print(f"\n{row.query!r} ({row.note})")
        for hit in row.hits:
            print(f"  {hit.score:.3f}  {hit.result:9}  {hit.image.name}  {hit.caption}")


if __name__ == "__main__":
    main()
