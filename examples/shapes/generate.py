"""Write images of a split, with their captions, as a folder.

    python examples/shapes/generate.py --split test --count 500 --out gallery

The folder holds PNG files and ``captions.jsonl``, one line an image: ``image`` (file name),
``caption``, and ``label`` where the image shows one thing (else null). No two captions are alike
unless ``--kind single`` asks for more images than there are different ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from captions import caption
from drawing import render
from world import KINDS, SPLITS, Kind, Scene, Split, scenes


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
