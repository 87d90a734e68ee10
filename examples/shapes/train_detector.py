"""Train a small OWL-ViT on the world of shapes, in transformers' own classes and on-disk format.

    python examples/shapes/train_detector.py --out examples/shapes/detector --minutes 45

Towers start from the trained CLIP (``train_clip.py``), heads anew. Each patch predicts a box near
its own place, so no matching is needed: a thing belongs to the patch under the middle of its box.
A step takes the 56 trained labels in one of several wordings as queries; eight labels and two
wordings are held out (``boxes.HELD_OUT``, ``boxes.HELD_OUT_WORDINGS``).

The learning rate follows the clock where ``--minutes`` is given; ``--steps`` counts steps instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from boxes import HELD_OUT, TRAINED, WORDINGS, BoxDataset, load_or_render
from captions import label_prompt
from dataset import model_pixels
from drawing import bounding_box, render
from optimising import Optimiser
from small_detector import (
    assign,
    build_detector,
    detect,
    detection_loss,
    embed_queries,
    image_processor,
    patch_states,
    to_pixels,
)
from transformers import CLIPTokenizerFast, OwlViTForObjectDetection
from workers import join_workers, run_workers
from world import LABELS, scenes

from mmedge.converters.evaluation.average_precision import Boxes, match_boxes, mean_precision

CLIP = Path(__file__).parent / "clip"
_SEEN_PATCHES, _ALL_PATCHES_FROM = 32, 0.6
"""Half of the patches, background, stay out of sight until this share of the run."""
_VALIDATION_SEED = 1
"""Validation draws from the training split under a seed of its own: the test split stays unseen."""


def tokenise(tokenizer: CLIPTokenizerFast, labels: tuple[str, ...], wording: str) -> torch.Tensor:
    """Return the tokens (L, T) int64 of labels in a wording, padded to the longest."""
    texts = [label_prompt(label, wording) for label in labels]
    return torch.tensor(tokenizer(texts, padding="longest").input_ids)


class Validation:
    """Scenes of the training split that no batch holds, with all 64 labels."""

    def __init__(self, tokenizer: CLIPTokenizerFast, count: int = 300) -> None:
        """Render the scenes."""
        held_out = scenes("train", count, seed=_VALIDATION_SEED)
        self._pixels = to_pixels(np.stack([model_pixels(render(s, 224)) for s in held_out]))
        self._tokens = tokenise(tokenizer, LABELS, WORDINGS[1])
        self._truth = [
            Boxes(
                np.array([bounding_box(thing) for thing in scene.things]),
                np.array([LABELS.index(thing.label) for thing in scene.things]),
                np.zeros(len(scene.things)),
            )
            for scene in held_out
        ]

    def figures(self, model: OwlViTForObjectDetection) -> dict[str, float]:
        """Return mAP@[.5:.95] over all labels and over those held out, and mAP at 0.5."""
        with torch.no_grad():
            queries = embed_queries(model.owlvit, self._tokens)
            hidden = patch_states(model.owlvit, self._pixels)
            logits, boxes = (part.numpy() for part in detect(model, hidden, queries))
        found = []
        for row in range(len(boxes)):
            middle, half = boxes[row, :, :2], boxes[row, :, 2:] / 2
            corners = np.concatenate([middle - half, middle + half], axis=1)
            found.append(Boxes(corners, logits[row].argmax(axis=1), logits[row].max(axis=1)))
        every = match_boxes(self._truth, found, len(LABELS))
        known = [i for i in range(len(LABELS)) if any(i in one.classes for one in self._truth)]
        apart = [m for i, m in zip(known, every, strict=True) if LABELS[i] in HELD_OUT]
        return {
            "map": mean_precision(every),
            "map_50": mean_precision(every, slice(0, 1)),
            "map_held_out": mean_precision(apart),
        }


def batches(
    data: BoxDataset, size: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield pixels, boxes and labels endlessly; half of the images are mirrored."""
    count = len(data.pixels)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            chosen = np.sort(order[start : start + size])
            pixels, boxes = data.pixels[chosen], data.boxes[chosen]
            flipped = rng.random(size) < 0.5
            pixels[flipped] = pixels[flipped, :, ::-1]
            boxes[flipped] = (boxes * [-1, 1, -1, 1] + [1, 0, 1, 0])[flipped][..., [2, 1, 0, 3]]
            labels = torch.from_numpy(data.labels[chosen].astype(np.int64))
            yield to_pixels(pixels), torch.from_numpy(boxes), labels


class Trainer:
    """The model in float32, a bfloat16 image tower that does the arithmetic, and the optimiser.

    The text tower is the CLIP's own and stays as it is.
    """

    def __init__(self, model: OwlViTForObjectDetection, learning_rate: float) -> None:
        """Set up training of ``model`` at a peak learning rate."""
        self.model, self._peak = model, learning_rate
        self._twin = copy.deepcopy(model.owlvit).bfloat16()
        vision, twin = model.owlvit.vision_model, self._twin.vision_model
        pairs = [
            pair
            for part, other in (
                (vision.embeddings, twin.embeddings),
                (vision.pre_layernorm, twin.pre_layernorm),
                (vision.encoder, twin.encoder),
            )
            for pair in zip(part.parameters(), other.parameters(), strict=True)
        ]
        exact = (vision.post_layernorm, model.layer_norm, model.class_head, model.box_head)
        pairs += [(each, each) for part in exact for each in part.parameters()]
        masters, twins = zip(*pairs, strict=True)
        self._optimiser = Optimiser(masters, twins, learning_rate)

    def step(
        self,
        batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        queries: torch.Tensor,
        progress: float,
    ) -> dict[str, float]:
        """Make one step; return its losses and mean IoU.

        Args:
            batch: Pixels, boxes and labels.
            queries: Of the trained labels, in one wording.
            progress: How much of the run is done, 0 to 1.
        """
        warm_up = min(1.0, progress * 50 + 0.01)
        self._optimiser.set_rate(self._peak * warm_up * 0.5 * (1 + math.cos(math.pi * progress)))
        pixels, boxes, labels = batch
        targets, kept = assign(boxes, labels), None
        if progress < _ALL_PATCHES_FROM:
            kept = targets.worth_seeing(_SEEN_PATCHES)
            targets = targets.at(kept)
        hidden = patch_states(self._twin, pixels.bfloat16(), kept)
        logits, found = detect(self.model, hidden, queries, kept)
        class_loss, box_loss, overlap = detection_loss(logits, found, targets)
        torch.autograd.backward(class_loss + box_loss)
        self._optimiser.apply()
        self._optimiser.refresh()
        losses = {"class_loss": class_loss, "box_loss": box_loss, "iou": overlap}
        return {name: value.item() for name, value in losses.items()}


def train(options: argparse.Namespace) -> None:
    """Train with the command line's options, one process a worker, saving every few minutes."""
    load_or_render(Path(options.cache), options.scenes, options.seed)
    run_workers(_work, options)


def _work(rank: int, options: argparse.Namespace) -> None:
    """Train on one thread; gradients are averaged over the workers at every step."""
    join_workers(rank, options)
    data = load_or_render(Path(options.cache), options.scenes, options.seed)
    tokenizer = CLIPTokenizerFast.from_pretrained(options.clip)
    model = build_detector(Path(options.clip))
    with torch.no_grad():
        queries = [
            embed_queries(model.owlvit, tokenise(tokenizer, TRAINED, wording))
            for wording in WORDINGS
        ]
    trainer = Trainer(model, options.learning_rate)
    validation = Validation(tokenizer) if rank == 0 else None
    rng = np.random.default_rng([options.seed, rank])
    began = saved = time.monotonic()
    for step, batch in enumerate(batches(data, options.batch, rng)):
        now = time.monotonic()
        spent_minutes = (now - began) / 60
        clock = torch.tensor(
            step / options.steps if options.steps else spent_minutes / options.minutes
        )
        torch.distributed.broadcast(clock, 0)
        if clock.item() >= 1.0:
            break
        losses = trainer.step(batch, queries[int(rng.integers(len(queries)))], clock.item())
        if validation is None or step % 50:
            continue
        line = {"step": step, "minutes": spent_minutes, **losses}
        if step % 300 == 0 and step:
            line |= validation.figures(trainer.model)
        print(json.dumps({k: round(v, 4) for k, v in line.items()}), flush=True)
        if now - saved > 180:
            saved = now
            _save(trainer.model, tokenizer, options.out)
    if validation is not None:
        _save(trainer.model, tokenizer, options.out)
        line = {"step": step, **validation.figures(trainer.model)}
        print(json.dumps({k: round(v, 4) for k, v in line.items()}), flush=True)
    torch.distributed.destroy_process_group()


def _save(model: OwlViTForObjectDetection, tokenizer: CLIPTokenizerFast, out: str) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    image_processor().save_pretrained(out)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--clip", default=str(CLIP), help="the CLIP that the towers start from")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=32, help="per worker")
    parser.add_argument("--scenes", type=int, default=64_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    cache = Path(tempfile.gettempdir()) / "mmedge-shapes"
    parser.add_argument("--cache", default=str(cache), help="folder for rendered scenes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
