"""Train the heads of the shapes world on the frozen CLIP, and write their bundles.

    mmedge convert examples/shapes/clip -o clip.mmedge --precision fp32 --taps patches,tokens
    python examples/shapes/train_heads.py clip.mmedge --out examples/shapes/heads

Taps are computed once by the bundle; a head then trains in about a minute of one CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
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
from torch import nn
from torch.nn import functional
from world import COLOURS, LABELS, SHAPES

import mmedge
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.converters import ConvertConfig, HeadSpec, SensorInput, TapInput, convert_module
from mmedge.converters.heads.fusion import AttentionFusion, DecisionFusion, FeatureFusion
from mmedge.models import DualEncoder
from mmedge.specs import TensorSpec

FLOAT, BOOL = np.dtype(np.float32), np.dtype(np.bool_)
Loss = Callable[[torch.Tensor], torch.Tensor]


def fit(
    module: nn.Module, loss: Loss, rows: int, *, epochs: int, batch: int = 128, rate: float = 2e-3
) -> None:
    """Minimise the mean loss over the rows by Adam, with a cosine schedule."""
    steps = epochs * -(-rows // batch)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    module.train()
    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for some in torch.split(torch.randperm(rows, generator=generator), batch):
            optimizer.zero_grad()
            value = loss(some)
            torch.autograd.backward(value)
            optimizer.step()
            schedule.step()
            total += float(value.detach()) * len(some)
        if epoch % 5 == 4 or epoch == epochs - 1:
            took = time.monotonic() - started
            print(f"  epoch {epoch + 1}: loss {total / rows:.4f}, {took:.0f} s", flush=True)
    module.eval()


def answers(examples: Sequence[Example]) -> torch.Tensor:
    """Return the right classes: (N,)."""
    return torch.tensor([each.answer for each in examples])


def taps(clip: DualEncoder, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """Return patches, image embeddings, tokens, mask and text embeddings of examples."""
    seen = clip.extract(frames(examples))
    distinct = sorted({each.text for each in examples})
    read = clip.extract_text(distinct)
    at = np.array([distinct.index(each.text) for each in examples])
    rows = (read["tokens"][at], read.masks["tokens"][at], read.embedding[at])
    given = (seen["patches"], seen.embedding, *rows)
    return tuple(map(torch.from_numpy, given))


def train_relations(clip: DualEncoder, bundle: Path, out: Path, count: int, epochs: int) -> None:
    """Attention fusion: is the statement true?"""
    examples = relation_examples("train", count, 0)
    patches, _, tokens, mask, _ = taps(clip, examples)
    right, where = answers(examples), torch.from_numpy(looked_at(examples))
    torch.manual_seed(0)
    module = AttentionFusion(patches.shape[1], patches.shape[2], tokens.shape[2], 2)

    def loss(some: torch.Tensor) -> torch.Tensor:
        scores, looks = module(patches[some], tokens[some], mask[some])
        there = -(where[some] * (looks + 1e-6).log()).sum(-1).mean()
        value: torch.Tensor = functional.cross_entropy(scores, right[some]) + there
        return value

    fit(module, loss, len(examples), epochs=epochs)
    count_tokens = TensorSpec("words", FLOAT, ("batch", "tokens", tokens.shape[2]))
    convert_module(
        module,
        ConvertConfig("relations", out / "relations.mmedge", overwrite=True),
        inputs=[
            TensorSpec("patches", FLOAT, ("batch", *patches.shape[1:])),
            count_tokens,
            TensorSpec("words_mask", BOOL, ("batch", "tokens")),
        ],
        outputs=[
            TensorSpec("scores", FLOAT, ("batch", 2)),
            TensorSpec("map", FLOAT, ("batch", 2, patches.shape[1])),
        ],
        head=HeadSpec(
            on=bundle,
            inputs={
                "patches": TapInput(modality="image", tap="patches"),
                "words": TapInput(modality="text", tap="tokens"),
            },
            labels=("no", "yes"),
            meanings={"scores": "scores", "map": "alignment"},
        ),
    )


def train_attribute(
    clip: DualEncoder, bundle: Path, out: Path, count: int, epochs: int, *, pooled: bool
) -> None:
    """Feature-level fusion: what shape is the red thing?"""
    examples = attribute_examples("train", count, 0)
    patches, embeddings, _, _, texts = taps(clip, examples)
    image, right = (embeddings if pooled else patches), answers(examples)
    torch.manual_seed(0)
    module = FeatureFusion(image.shape[-1], texts.shape[-1], len(SHAPES))

    def loss(some: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(module(image[some], texts[some]), right[some])

    fit(module, loss, len(examples), epochs=epochs, rate=1e-3)
    name = "attribute-pooled" if pooled else "attribute"
    convert_module(
        module,
        ConvertConfig(name, out / f"{name}.mmedge", overwrite=True),
        inputs=[
            TensorSpec("image", FLOAT, ("batch", *image.shape[1:])),
            TensorSpec("text", FLOAT, ("batch", *texts.shape[1:])),
        ],
        outputs=[TensorSpec("scores", FLOAT, ("batch", len(SHAPES)))],
        head=HeadSpec(
            on=bundle,
            inputs={
                "image": TapInput(modality="image", tap="embedding" if pooled else "patches"),
                "text": TapInput(modality="text"),
            },
            labels=SHAPES,
            meanings={"scores": "scores"},
        ),
    )


class NightHead(nn.Module):
    """A camera at night and a sonar: zero-shot logits, and a small network on silhouettes.

    The sonar sees a shape and no colour: its decision on 64 labels is that on 8 shapes.

    Args:
        labels: (64, D) embeddings of the labels.
        scale: Scale of their cosines.
    """

    labels: torch.Tensor

    def __init__(self, labels: Floats, scale: float) -> None:
        super().__init__()
        self.register_buffer("labels", torch.from_numpy(labels))
        self.scale = scale
        self.sonar = nn.Sequential(
            nn.Linear(256, 128), nn.GELU(), nn.Dropout(0.3), nn.Linear(128, len(SHAPES))
        )
        self.fusion = DecisionFusion(torch.ones(2))

    def decisions(self, camera: torch.Tensor, sonar: torch.Tensor) -> torch.Tensor:
        """Return the logits of both sensors: (B, 2, 64)."""
        seen = self.scale * camera @ self.labels.T
        return torch.stack([seen, self.sonar(sonar).repeat(1, len(COLOURS))], 1)

    def forward(
        self, camera: torch.Tensor, sonar: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Return log probabilities (B, 64)."""
        fused: torch.Tensor = self.fusion(self.decisions(camera, sonar), present)
        return fused


def fit_temperatures(module: NightHead, decisions: torch.Tensor, right: torch.Tensor) -> None:
    """Fit a temperature for each sensor by LBFGS on the likelihood of held-out decisions."""
    logs = torch.zeros(decisions.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200)
    there = torch.ones(decisions.shape[:2], dtype=torch.bool)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.nll_loss(DecisionFusion(logs.exp())(decisions, there), right)
        torch.autograd.backward(value)
        return value

    optimizer.step(step)  # type: ignore[no-untyped-call]  # torch has no annotation
    module.fusion = DecisionFusion(logs.detach().exp())


def train_night(clip: DualEncoder, bundle: Path, out: Path, count: int, epochs: int) -> None:
    """Decision-level fusion: a noisy camera and a sonar."""
    examples, held = night_examples("train", count, 0), night_examples("calibration", 300, 0)
    labels = clip.encode_text([f"a photo of a {label}" for label in LABELS])
    kind = clip.manifest.kind
    assert isinstance(kind, DualEncoderKind)  # noqa: S101, a CLIP is one
    assert kind.contrastive_head is not None  # noqa: S101, of both towers
    torch.manual_seed(0)
    module = NightHead(labels, kind.contrastive_head.logit_scale)
    sonar = torch.from_numpy(silhouettes(examples, 0))
    shapes = answers(examples) % len(SHAPES)

    def loss(some: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(module.sonar(sonar[some]), shapes[some])

    fit(module.sonar, loss, len(examples), epochs=epochs)
    camera = torch.from_numpy(clip.encode_image(at_night(frames(held), 0)))
    with torch.inference_mode():
        decisions = module.decisions(camera, torch.from_numpy(silhouettes(held, 1)))
    useless = module.decisions(camera, torch.randn(len(held), 256)).detach()
    for name, given in (("night", decisions), ("night-useless", useless), ("night-raw", None)):
        module.fusion = DecisionFusion(torch.ones(2))  # the product without temperatures
        if given is not None:
            fit_temperatures(module, given.clone(), answers(held))
        print(f"  {name}: temperatures {module.fusion.temperatures.tolist()}")
        convert_module(
            module,
            ConvertConfig(name, out / f"{name}.mmedge", overwrite=True),
            inputs=[
                TensorSpec("camera", FLOAT, ("batch", labels.shape[1])),
                TensorSpec("sonar", FLOAT, ("batch", 256)),
                TensorSpec("present", BOOL, ("batch", 2)),
            ],
            outputs=[TensorSpec("log_probabilities", FLOAT, ("batch", len(LABELS)))],
            head=HeadSpec(
                on=bundle,
                inputs={
                    "camera": TapInput(modality="image", missing="marginalize"),
                    "sonar": SensorInput(missing="marginalize"),
                },
                present="present",
                labels=LABELS,
                meanings={"log_probabilities": "scores"},
            ),
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the heads of the shapes world.")
    parser.add_argument("bundle", type=Path, help="the shapes CLIP, converted with both taps")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("relations", "attribute", "night"))
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    given = (options.bundle, options.out, options.scenes, options.epochs)
    with mmedge.load(options.bundle, precision="fp32") as clip:
        assert isinstance(clip, DualEncoder)  # noqa: S101, a CLIP is one
        if options.only in {None, "night"}:
            print("night")
            train_night(clip, *given)
        if options.only in {None, "relations"}:
            print("relations")
            train_relations(clip, *given)
        if options.only in {None, "attribute"}:
            for pooled in (False, True):
                print(f"attribute, {'pooled' if pooled else 'patches'}")
                train_attribute(clip, *given, pooled=pooled)


if __name__ == "__main__":
    main()
