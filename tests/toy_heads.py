"""A head on the tapped tiny CLIP: patches, tokens with a learned default, a sonar left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmedge.converters import ConvertConfig, HeadSpec, SensorInput, TapInput, convert_module
from mmedge.specs import TensorSpec

FLOAT, BOOL = np.dtype(np.float32), np.dtype(np.bool_)
WIDTH, SONAR = 32, 8
LABELS = ("yes", "no", "unclear")
INPUTS = (
    TensorSpec("patches", FLOAT, ("batch", 16, WIDTH)),
    TensorSpec("words", FLOAT, ("batch", "tokens", WIDTH)),
    TensorSpec("words_mask", BOOL, ("batch", "tokens")),
    TensorSpec("sonar", FLOAT, ("batch", SONAR)),
    TensorSpec("present", BOOL, ("batch", 1)),
)
OUTPUTS = (
    TensorSpec("scores", FLOAT, ("batch", len(LABELS))),
    TensorSpec("map", FLOAT, ("batch", "tokens", 16)),
)


class ToyHead(nn.Module):
    """Words attend to patches; the sonar adds what it says where it is there."""

    def __init__(self, *, leaks: bool = False) -> None:
        super().__init__()
        self.leaks = leaks
        generator = torch.Generator().manual_seed(7)
        self.query, self.key = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.out, self.sonar = nn.Linear(WIDTH, len(LABELS)), nn.Linear(SONAR, len(LABELS))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(
        self,
        patches: torch.Tensor,
        words: torch.Tensor,
        mask: torch.Tensor,
        sonar: torch.Tensor,
        present: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.query(words) @ self.key(patches).transpose(1, 2) / 4
        attention = torch.softmax(scores, -1)
        kept = mask.unsqueeze(-1).float()
        seen = ((attention @ patches) * kept).sum(1) / kept.sum(1)
        heard = self.sonar(sonar)
        if not self.leaks:
            heard = torch.where(present, heard, torch.zeros_like(heard))
        return self.out(seen) + heard, attention


def toy_spec(on: Path, **changes: object) -> HeadSpec:
    """The head's description; `changes` replace inputs by name."""
    default = np.random.default_rng(3).standard_normal((2, WIDTH)).astype(np.float32)
    inputs: dict[str, object] = {
        "patches": TapInput(modality="image", tap="patches", max_skew_ms=100),
        "words": TapInput(modality="text", tap="tokens", missing="default", default=default),
        "sonar": SensorInput(missing="marginalize", max_skew_ms=50),
    }
    return HeadSpec(
        on=on,
        inputs=inputs | changes,  # type: ignore[arg-type]
        present="present",
        labels=LABELS,
        meanings={"scores": "scores", "map": "alignment"},
    )


def write_toy_head(on: Path, out: Path) -> Path:
    """Convert the head in fp32."""
    convert_module(
        ToyHead(), ConvertConfig("toy-head", out), inputs=INPUTS, outputs=OUTPUTS, head=toy_spec(on)
    )
    return out
