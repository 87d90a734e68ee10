"""ConvNeXt of timm, as open_clip's checkpoints name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from mmedge.converters.families.open_clip_config import TimmVisionConfig
from mmedge.converters.families.open_clip_timm import adapter

__all__ = ["CONVNEXT", "ChannelNorm", "ConvNextArchitecture", "ConvNextVisionTower"]


@dataclass(frozen=True)
class ConvNextArchitecture:
    """A ConvNeXt of timm.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        eps: Of the layer norms.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    eps: float = 1e-6


_USUAL = (3, 3, 27, 3)
CONVNEXT: dict[str, ConvNextArchitecture] = {
    "convnext_tiny": ConvNextArchitecture((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ConvNextArchitecture(_USUAL, (96, 192, 384, 768)),
    "convnext_base": ConvNextArchitecture(_USUAL, (128, 256, 512, 1024)),
    "convnext_large": ConvNextArchitecture(_USUAL, (192, 384, 768, 1536)),
    "convnext_xlarge": ConvNextArchitecture(_USUAL, (256, 512, 1024, 2048)),
    "convnext_xxlarge": ConvNextArchitecture((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
}
"""By timm's names."""


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        hidden = self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](hidden))) * self.gamma
        return cast(torch.Tensor, x + hidden.permute(0, 3, 1, 2))


class _Stage(nn.Module):
    def __init__(self, before: int, width: int, depth: int, eps: float) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if before != width:
            self.downsample = nn.Sequential(
                ChannelNorm(before, eps), nn.Conv2d(before, width, 2, stride=2)
            )
        self.blocks = nn.Sequential(*(_Block(width, eps) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.blocks(self.downsample(x)))


class _Trunk(nn.Module):
    def __init__(self, shape: ConvNextArchitecture, out: int) -> None:
        super().__init__()
        widths, eps = shape.widths, shape.eps
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps))
        self.stages = nn.Sequential(
            *(
                _Stage(before, width, depth, eps)
                for before, width, depth in zip(
                    (widths[0], *widths), widths, shape.depths, strict=False
                )
            )
        )
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(widths[-1], eps)})
        if out:
            self.head["fc"] = nn.Linear(widths[-1], out)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.head["norm"](self.stages(self.stem(pixel_values)).mean(dim=(2, 3)))
        return cast(torch.Tensor, self.head["fc"](pooled) if "fc" in self.head else pooled)


class ConvNextVisionTower(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, dim), not normalised.

    Args:
        config: The tower.
        shape: Its architecture.
        dim: Of the embedding.
    """

    def __init__(self, config: TimmVisionConfig, shape: ConvNextArchitecture, dim: int) -> None:
        super().__init__()
        self.trunk = _Trunk(shape, 0 if config.projection is not None else dim)
        self.head = adapter(config, shape.widths[-1], dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images."""
        return cast(torch.Tensor, self.head(self.trunk(pixel_values)))
