"""Write images of a split, with their captions, as a folder.

    python examples/shapes/generate.py --split test --count 500 --out gallery

The folder holds PNG files and ``captions.jsonl``, one line an image: ``image`` (file name),
``caption``, and ``label`` where the image shows one thing (else null). No two captions are alike
unless ``--kind single`` asks for more images than there are different ones. ``annotations.json``
holds the true boxes in COCO's format; its categories are the 64 labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from captions import caption
from drawing import pixel_box, render
from world import KINDS, LABELS, SPLITS, Kind, Scene, Split, scenes


def captioned(
    split: Split, count: int, seed: int = 0, kind: Kind | None = None
) -> list[tuple[Scene, str]]:
    """Return scenes of a split with one full caption each, no two captions equal where possible.

    A caption that is taken already is worded anew, a few times over; a scene of which nothing else
    can be said makes way for another. Only where the split has no more to offer do captions repeat.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 77])
    found: list[tuple[Scene, str]] = []
    spare: list[tuple[Scene, str]] = []
    taken: set[str] = set()
    for scene in scenes(split, count + count // 4, seed, kind):
        text = caption(scene, rng)
        for _ in range(8):
            if text not in taken:
                break
            text = caption(scene, rng)
        (spare if text in taken else found).append((scene, text))
        taken.add(text)
    return (found + spare)[:count]


def write_folder(pairs: list[tuple[Scene, str]], out: Path, size: int | tuple[int, int]) -> None:
    """Render captioned scenes into ``out`` at ``size`` pixels, side or (width, height)."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (scene, text) in enumerate(pairs):
        name = f"{index:05d}.png"
        render(scene, size).save(out / name)
        lines.append(json.dumps({"image": name, "caption": text, "label": scene.label}))
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = coco_document([scene for scene, _ in pairs], size)
    (out / "annotations.json").write_text(json.dumps(document), encoding="utf-8")


def coco_document(scenes: Sequence[Scene], size: int | tuple[int, int]) -> dict[str, Any]:
    """Return the true boxes of scenes rendered at ``size``, in COCO's format."""
    width, height = (size, size) if isinstance(size, int) else size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        name = f"{index:05d}.png"
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for thing in scene.things:
            left, top, right, bottom = (round(value, 3) for value in pixel_box(thing, size))
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": index,
                "category_id": LABELS.index(thing.label) + 1,
                "bbox": [left, top, right - left, bottom - top],
            })  # fmt: skip
    categories = [{"id": number + 1, "name": label} for number, label in enumerate(LABELS)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write images of coloured shapes.")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of scene only")
    parser.add_argument("--size", type=_size, default=224, help="pixels: 224, or 640x480")
    options = parser.parse_args(arguments)
    pairs = captioned(options.split, options.count, options.seed, options.kind)
    write_folder(pairs, options.out, options.size)
    print(f"{len(pairs)} images of the {options.split} split in {options.out}")


def _size(text: str) -> int | tuple[int, int]:
    try:
        numbers = [int(number) for number in text.split("x")]
        width, height = numbers * 2 if len(numbers) == 1 else numbers
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 224 or 640x480") from None
    if not all(16 <= side <= 4096 for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r}: sides run from 16 to 4096 pixels")
    return width, height


if __name__ == "__main__":
    main()
