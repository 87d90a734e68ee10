"""Write sounds of a split, with their captions, as a folder.

    python examples/shapes/generate_sounds.py --split test --count 500 --out sounds
    python examples/shapes/generate_sounds.py --split test --count 50 --scenes --out both

The folder holds WAV files (16 kHz, 16 bit) and ``captions.jsonl``, one line a sound: ``audio``
(file name), ``caption`` and, with ``--scenes``, ``image``: the scene that sounds so. Captions of
the test and calibration splits are worded as none in training is.
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
from drawing import render
from playing import RATE, play
from sound_captions import sound_caption
from sounds import SOUND_KINDS, Sound, SoundKind, sound_of, sounding_scenes, sounds
from world import SPLITS, Scene, Split


def captioned_sounds(
    split: Split, count: int, seed: int = 0, kind: SoundKind | None = None
) -> list[tuple[Sound, str]]:
    """Return sounds of a split, no two of the same content, with one caption each."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 79])
    return [
        (sound, sound_caption(sound, rng, unseen=split != "train"))
        for sound in sounds(split, count, seed, kind)
    ]


def captioned_scenes(split: Split, count: int, seed: int = 0) -> list[tuple[Sound, str, Scene]]:
    """Return scenes of a split whose sounds are of it too: the sound, its caption and the scene."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 83])
    found = []
    for scene in sounding_scenes(split, count, seed):
        sound = sound_of(scene, take=int(rng.integers(2**62)))
        found.append((sound, sound_caption(sound, rng, unseen=split != "train"), scene))
    return found


def write_wav(path: Path, samples: npt.NDArray[np.float32], rate: int = RATE) -> None:
    """Write samples in -1..1, (N,) or (N, channels), as 16-bit PCM."""
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


def write_sounds(
    pairs: list[tuple[Sound, str]], out: Path, scenes: list[Scene] | None = None
) -> None:
    """Write captioned sounds into ``out``, and beside each the image of its scene if given."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (sound, text) in enumerate(pairs):
        line = {"audio": f"{index:05d}.wav", "caption": text}
        write_wav(out / line["audio"], play(sound))
        if scenes is not None:
            line["image"] = f"{index:05d}.png"
            render(scenes[index]).save(out / line["image"])
        lines.append(json.dumps(line))
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write sounds of tones and spoken digits.")
    parser.add_argument("--split", choices=list(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(SOUND_KINDS), help="one kind of sound only")
    parser.add_argument("--scenes", action="store_true", help="sounds of scenes, and their images")
    options = parser.parse_args(arguments)
    if options.scenes:
        triples = captioned_scenes(options.split, options.count, options.seed)
        pairs = [(sound, text) for sound, text, _ in triples]
        write_sounds(pairs, options.out, [scene for _, _, scene in triples])
    else:
        pairs = captioned_sounds(options.split, options.count, options.seed, options.kind)
        write_sounds(pairs, options.out)
    print(f"{len(pairs)} sounds of the {options.split} split in {options.out}")


if __name__ == "__main__":
    main()
