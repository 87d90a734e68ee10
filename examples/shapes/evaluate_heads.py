"""Evaluate the heads of the shapes world, through their bundles, on scenes of any seed.

    mmedge convert examples/shapes/clip -o clip.mmedge --precision fp32 --taps patches,tokens
    python examples/shapes/evaluate_heads.py clip.mmedge --seed 7 --count 500 --json

Scenes are of the test split, whose contents no training scene has. For each head: accuracy with a
95 % interval, chance, and the accuracy with each input shuffled among the samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from head_tasks import (
    Example,
    Floats,
    at_night,
    attribute_examples,
    frames,
    looked_at,
    night_examples,
    relation_examples,
    silhouettes,
)
from numpy.typing import NDArray
from world import LABELS, SHAPES

import mmedge
from mmedge.models import DualEncoder
from mmedge.models.features import Features
from mmedge.models.fused import FusedModel
from mmedge.models.prototypes import Accuracy

HEADS = Path(__file__).parent / "heads"
_BATCH = 64
_BINS = 15
Figures = dict[str, object]


def shuffled(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return an order in which no sample keeps its place."""
    order = np.random.default_rng(seed).permutation(count)
    made = np.empty(count, np.int64)
    made[order] = np.roll(order, 1)
    return made


def rows_of(features: Features, rows: NDArray[np.int64]) -> Features:
    """Return the features of some samples."""
    return replace(
        features,
        arrays={name: array[rows] for name, array in features.arrays.items()},
        masks={name: mask[rows] for name, mask in features.masks.items()},
    )


def accuracy(right: NDArray[np.bool_]) -> Figures:
    """Return a share with its 95 % interval."""
    found = Accuracy(int(right.sum()), len(right))
    low, high = found.interval
    return {"accuracy": found.value, "low": low, "high": high}


def scores_of(
    head: FusedModel, given: Mapping[str, Features | Floats], count: int
) -> tuple[Floats, Mapping[str, Floats]]:
    """Run a head batch by batch; return its scores and the outputs of the last batch."""
    made: list[Mapping[str, Floats]] = []
    for start in range(0, count, _BATCH):
        some = np.arange(start, min(start + _BATCH, count))
        made.append(
            head(
                {
                    name: rows_of(each, some) if isinstance(each, Features) else each[some]
                    for name, each in given.items()
                }
            ).outputs
        )
    joined = {name: np.concatenate([each[name] for each in made]) for name in made[0]}
    return next(iter(joined.values())), joined


def ablated(
    head: FusedModel, given: Mapping[str, Features | Floats], right: NDArray[np.int64]
) -> Figures:
    """Return the accuracy, and that with each input shuffled."""
    count = len(right)
    scores, _ = scores_of(head, given, count)
    figures = accuracy(scores.argmax(-1) == right)
    order = shuffled(count)
    for name, each in given.items():
        mixed = rows_of(each, order) if isinstance(each, Features) else each[order]
        other, _ = scores_of(head, {**given, name: mixed}, count)
        figures[f"{name}_shuffled"] = float((other.argmax(-1) == right).mean())
    return figures


def questions(clip: DualEncoder, examples: list[Example]) -> tuple[Features, Features]:
    """Return the features of the frames and of the texts of examples."""
    distinct = sorted({each.text for each in examples})
    at = np.array([distinct.index(each.text) for each in examples])
    return clip.extract(frames(examples)), rows_of(clip.extract_text(distinct), at)


def relations(clip: DualEncoder, folder: Path, count: int, seed: int) -> Figures:
    """Attention fusion on relation statements, and where its phrases look."""
    examples = relation_examples("test", count, seed)
    image, text = questions(clip, examples)
    right = np.array([each.answer for each in examples])
    with mmedge.load_head(folder / "relations.mmedge", on=clip) as head:
        given: dict[str, Features | Floats] = {"patches": image, "words": text}
        figures = ablated(head, given, right) | {"chance": 0.5}
        _, outputs = scores_of(head, given, len(examples))
    looks, where = outputs["map"].argmax(-1), looked_at(examples) > 0
    at = np.arange(len(examples))[:, None]
    hit = where[at, np.arange(looks.shape[1]), looks]
    return figures | {"pointing": float(hit.mean()), "samples": len(examples)}


def attribute(clip: DualEncoder, folder: Path, count: int, seed: int) -> Figures:
    """Feature-level fusion on the attribute question, from patches and from the embedding."""
    examples = attribute_examples("test", count, seed)
    image, text = questions(clip, examples)
    right = np.array([each.answer for each in examples])
    made: Figures = {"chance": 1 / len(SHAPES), "samples": len(examples)}
    for name, key in (("attribute", "patches"), ("attribute-pooled", "embedding")):
        with mmedge.load_head(folder / f"{name}.mmedge", on=clip) as head:
            made[key] = ablated(head, {"image": image, "text": text}, right)
    return made


def calibration(logs: Floats, right: NDArray[np.int64]) -> Figures:
    """Return negative log likelihood and expected calibration error."""
    sure = np.exp(logs.max(-1))
    hit = logs.argmax(-1) == right
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(float(sure[bins == each].mean() - hit[bins == each].mean()))
        * float((bins == each).sum())
        for each in range(_BINS)
        if (bins == each).any()
    ]
    likelihood = -logs[np.arange(len(right)), right].mean()
    return {"nll": float(likelihood), "ece": sum(gaps) / len(right)}


def night(clip: DualEncoder, folder: Path, count: int, seed: int) -> Figures:
    """Decision-level fusion: camera at night and sonar, each alone, raw and fitted."""
    examples = night_examples("test", count, seed)
    right = np.array([each.answer for each in examples])
    camera = clip.extract(at_night(frames(examples), seed))
    sonar = silhouettes(examples, seed + 100)
    both: dict[str, Features | Floats] = {"camera": camera, "sonar": sonar}
    made: Figures = {"chance": 1 / len(LABELS), "samples": len(examples)}
    for name, key in (("night", "fitted"), ("night-raw", "raw")):
        with mmedge.load_head(folder / f"{name}.mmedge", on=clip) as head:
            logs, _ = scores_of(head, both, len(examples))
            made[key] = ablated(head, both, right) | calibration(logs, right)
            if key == "fitted":
                for sensor, value in both.items():
                    alone, _ = scores_of(head, {sensor: value}, len(examples))
                    made[f"{sensor}_alone"] = accuracy(alone.argmax(-1) == right)
    noise = np.random.default_rng(seed).standard_normal(sonar.shape).astype(np.float32)
    with mmedge.load_head(folder / "night-useless.mmedge", on=clip) as head:
        logs, _ = scores_of(head, {"camera": camera, "sonar": noise}, len(examples))
        made["useless_sonar"] = accuracy(logs.argmax(-1) == right)
    return made


TASKS: Mapping[str, Callable[[DualEncoder, Path, int, int], Figures]] = {
    "relations": relations,
    "attribute": attribute,
    "night": night,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Evaluate the heads of the shapes world.")
    parser.add_argument("bundle", type=Path, nargs="?", help="shapes CLIP with both taps")
    parser.add_argument("--heads", type=Path, default=HEADS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", choices=list(TASKS), action="append")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or _converted(Path(folder))
        with mmedge.load(bundle, precision="fp32") as clip:
            assert isinstance(clip, DualEncoder)  # noqa: S101, a CLIP is one
            made = {
                name: task(clip, options.heads, options.count, options.seed)
                for name, task in TASKS.items()
                if name in (options.only or TASKS)
            }
    if options.json:
        print(json.dumps(made, indent=1))
        return
    for name, figures in made.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key}: {value}")


def _converted(folder: Path) -> Path:
    from mmedge.converters import ConvertConfig, convert

    out = folder / "clip.mmedge"
    source = str(Path(__file__).parent / "clip")
    convert(ConvertConfig(source, out, taps=("patches", "tokens")))
    return out


if __name__ == "__main__":
    main()
