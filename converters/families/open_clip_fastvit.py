"""FastViT of timm, MobileCLIP's image tower: its branches joined into one convolution each.

A checkpoint holds the branches of the training (a block's convolutions, scale and identity, each
with a batch norm), or what timm's `reparameterize` made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from mmedge.converters.families.open_clip_config import TimmVisionConfig
from mmedge.converters.families.open_clip_convnext import ChannelNorm
from mmedge.converters.families.open_clip_modules import (
    BatchNorm,
    ConvNorm,
    attend,
    convolution,
    linear,
)
from mmedge.converters.families.open_clip_timm import adapter

__all__ = ["FASTVIT", "FastVitArchitecture", "FastVitVisionTower"]

_HEAD = 32  # values of a head


@dataclass(frozen=True)
class FastVitArchitecture:
    """A FastViT.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        ratio: Of an MLP's hidden width to the stage's.
        attention: Last stages whose blocks attend, and that have positions.
        squeezed: Last stages whose first layer is squeezed and excited.
        layer_norm: Layer norms before attention, not batch norms.
        stem_scale: The stem has scale branches.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    ratio: int = 3
    attention: int = 1
    squeezed: int = 2
    layer_norm: bool = False
    stem_scale: bool = True


def _large(depths: tuple[int, ...], width: int) -> FastVitArchitecture:
    widths = tuple(width << stage for stage in range(5))
    return FastVitArchitecture(depths, widths, 4, 2, 0, layer_norm=True, stem_scale=False)


FASTVIT: dict[str, FastVitArchitecture] = {
    "fastvit_mci0": FastVitArchitecture((2, 6, 10, 2), (64, 128, 256, 512)),
    "fastvit_mci1": FastVitArchitecture((4, 12, 20, 4), (64, 128, 256, 512)),
    "fastvit_mci2": FastVitArchitecture((4, 12, 24, 4), (80, 160, 320, 640)),
    "fastvit_mci3": _large((2, 12, 24, 4, 2), 96),
    "fastvit_mci4": _large((2, 12, 24, 4, 4), 128),
}
"""By timm's names."""


class _Joined(nn.Module):
    """Branches over one input, `reparam_conv` from `unpack` on."""

    def __init__(self, before: int, width: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.sizes = (before, width, kernel, stride, groups)

    def join(self, *, joined: bool) -> None:
        """Make the one convolution at once where the checkpoint holds it."""
        if joined:
            before, width, kernel, stride, groups = self.sizes
            self.reparam_conv = nn.Conv2d(
                before, width, kernel, stride, padding=kernel // 2, groups=groups
            )

    def branches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield kernel and bias of each branch."""
        raise NotImplementedError

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kernel and bias of all branches."""
        size = self.sizes[2]
        total: list[torch.Tensor] = []
        for kernel, bias in self.branches():
            pad = (size - kernel.shape[-1]) // 2
            padded = functional.pad(kernel, [pad] * 4)
            total = [padded, bias] if not total else [total[0] + padded, total[1] + bias]
        return total[0], total[1]

    def identity_kernel(self) -> torch.Tensor:
        """Return the kernel that changes nothing."""
        width, size, groups = self.sizes[1], self.sizes[2], self.sizes[4]
        made = torch.zeros(width, width // groups, size, size)
        places = torch.arange(width)
        made[places, places % (width // groups), size // 2, size // 2] = 1
        return made

    def unpack(self) -> None:
        """Turn the branches into one convolution."""
        if hasattr(self, "reparam_conv"):
            return
        _, _, _, stride, groups = self.sizes
        made = convolution(*self.kernel(), stride, groups)
        for name in ("identity", "conv_kxk", "conv_scale", "large_conv", "small_conv", "norm",
                     "mixer", "layer_scale", "pos_enc"):  # fmt: skip
            if hasattr(self, name):
                delattr(self, name)
        self.reparam_conv = made


class _Squeeze(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class _MobileOne(_Joined):
    def __init__(  # noqa: PLR0913, all that blocks differ in
        self,
        before: int,
        width: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        joined: bool,
        act: bool = True,
        scale: bool = True,
        mixes: bool = True,
        squeeze: int = 0,
    ) -> None:
        super().__init__(before, width, kernel, stride, groups)
        self.se: nn.Module = _Squeeze(width, squeeze) if squeeze else nn.Identity()
        self.act: nn.Module = nn.GELU() if act else nn.Identity()
        self.join(joined=joined)
        if joined:
            return
        shape = {"stride": stride, "groups": groups}
        if before == width and stride == 1:
            self.identity = BatchNorm(width)
        if mixes:
            self.conv_kxk = nn.ModuleList([ConvNorm(before, width, kernel, **shape)])
        if kernel > 1 and scale:
            self.conv_scale = ConvNorm(before, width, 1, **shape)

    def branches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if hasattr(self, "identity"):
            factor, offset = self.identity.affine()
            yield self.identity_kernel() * factor[:, None, None, None], offset
        if hasattr(self, "conv_scale"):
            yield self.conv_scale.joined()
        for each in getattr(self, "conv_kxk", ()):
            yield each.joined()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.act(self.se(self.reparam_conv(x))))


class _LargeKernel(_Joined):
    def __init__(self, before: int, width: int, *, squeeze: int, joined: bool) -> None:
        super().__init__(before, width, 7, 2, before)
        self.se: nn.Module = _Squeeze(width, squeeze) if squeeze else nn.Identity()
        self.join(joined=joined)
        if not joined:
            self.large_conv = ConvNorm(before, width, 7, stride=2, groups=before)
            self.small_conv = ConvNorm(before, width, 3, stride=2, groups=before)

    def branches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.large_conv.joined()
        yield self.small_conv.joined()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.se(self.reparam_conv(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, 1, 1))


class _Mixer(_Joined):
    def __init__(self, width: int, *, joined: bool) -> None:
        super().__init__(width, width, 3, 1, width)
        self.join(joined=joined)
        if not joined:
            shape = (width, width, 3, 1, width)
            self.norm = _MobileOne(*shape, joined=False, act=False, scale=False, mixes=False)
            self.mixer = _MobileOne(*shape, joined=False, act=False)
            self.layer_scale = _Scale(width)

    def branches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        gamma = self.layer_scale.gamma
        (kernel, bias), (less, less_bias) = self.mixer.kernel(), self.norm.kernel()
        mixed = self.identity_kernel() + gamma[..., None] * (kernel - less)
        yield mixed, gamma.flatten() * (bias - less_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.reparam_conv(x))


class _Positions(_Joined):
    def __init__(self, width: int, *, joined: bool) -> None:
        super().__init__(width, width, 7, 1, width)
        self.join(joined=joined)
        if not joined:
            self.pos_enc = nn.Conv2d(width, width, 7, padding=3, groups=width)

    def branches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.identity_kernel() + self.pos_enc.weight, cast(torch.Tensor, self.pos_enc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.reparam_conv(x))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv = ConvNorm(width, width, 7, groups=width)
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.fc2(functional.gelu(self.fc1(self.conv(x)))))


def _scale(layer: nn.Conv2d | nn.Linear, scale: _Scale) -> None:
    """Multiply a layer's output channels by a learned scale."""
    factor = scale.gamma.detach().flatten()
    weight, bias = layer.weight, cast(torch.Tensor, layer.bias)
    layer.weight = nn.Parameter(weight.detach() * factor.view(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(bias.detach() * factor)


class _MixerBlock(nn.Module):
    def __init__(self, width: int, ratio: int, *, joined: bool) -> None:
        super().__init__()
        self.token_mixer = _Mixer(width, joined=joined)
        self.mlp, self.layer_scale = _Mlp(width, ratio * width), _Scale(width)

    def unpack(self) -> None:
        """Take the learned scale into the layer before it."""
        _scale(self.mlp.fc2, self.layer_scale)
        del self.layer_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token_mixer(x)
        return cast(torch.Tensor, x + self.mlp(x))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def split(self, factor: torch.Tensor, offset: torch.Tensor) -> None:
        """Split the projection, what is before it multiplied and offset by channel."""
        weights = self.qkv.weight.chunk(3)
        for name, each in zip(("query", "key", "value"), weights, strict=True):
            setattr(self, name, linear(each * factor, each @ offset))
        del self.qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            getattr(self, name)(x).unflatten(-1, (-1, _HEAD)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return cast(torch.Tensor, self.proj(attend(query, key, value)))


class _AttentionBlock(nn.Module):
    def __init__(self, width: int, ratio: int, *, layer_norm: bool) -> None:
        super().__init__()
        self.norm: nn.Module = ChannelNorm(width, 1e-5) if layer_norm else BatchNorm(width)
        self.token_mixer, self.mlp = _Attention(width), _Mlp(width, ratio * width)
        self.layer_scale_1, self.layer_scale_2 = _Scale(width), _Scale(width)

    def unpack(self) -> None:
        """Take a batch norm and the learned scales into the layers beside them."""
        width = self.token_mixer.proj.in_features
        factor, offset = torch.ones(width), torch.zeros(width)
        if isinstance(self.norm, BatchNorm):
            factor, offset = self.norm.affine()
            self.norm = nn.Identity()
        self.token_mixer.split(factor, offset)
        _scale(self.token_mixer.proj, self.layer_scale_1)
        _scale(self.mlp.fc2, self.layer_scale_2)
        del self.layer_scale_1, self.layer_scale_2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        mixed = self.token_mixer(self.norm(x).flatten(2).transpose(1, 2))
        x = x + mixed.transpose(1, 2).unflatten(2, (height, width))
        return cast(torch.Tensor, x + self.mlp(x))


class _Stage(nn.Module):
    def __init__(self, shape: FastVitArchitecture, stage: int, *, joined: bool) -> None:
        super().__init__()
        width, last = shape.widths[stage], len(shape.widths) - stage
        attends = last <= shape.attention
        self.downsample: nn.Module = nn.Identity()
        if stage:
            squeeze = max(8, (width // 4 + 4) // 8 * 8) if last <= shape.squeezed else 0
            first = _LargeKernel(shape.widths[stage - 1], width, squeeze=squeeze, joined=joined)
            second = _MobileOne(width, width, 1, joined=joined)
            self.downsample = nn.ModuleDict({"proj": nn.Sequential(first, second)})
        self.pos_emb = _Positions(width, joined=joined) if attends else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                _AttentionBlock(width, shape.ratio, layer_norm=shape.layer_norm)
                if attends
                else _MixerBlock(width, shape.ratio, joined=joined)
                for _ in range(shape.depths[stage])
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.downsample, nn.ModuleDict):
            x = self.downsample["proj"](x)
        return cast(torch.Tensor, self.blocks(self.pos_emb(x)))


class _Trunk(nn.Module):
    def __init__(self, shape: FastVitArchitecture, out: int, *, joined: bool) -> None:
        super().__init__()
        width, last, scale = shape.widths[0], shape.widths[-1], shape.stem_scale
        self.stem = nn.Sequential(
            _MobileOne(3, width, 3, 2, scale=scale, joined=joined),
            _MobileOne(width, width, 3, 2, width, scale=scale, joined=joined),
            _MobileOne(width, width, 1, scale=scale, joined=joined),
        )
        self.stages = nn.Sequential(
            *(_Stage(shape, stage, joined=joined) for stage in range(len(shape.widths)))
        )
        self.final_conv = _MobileOne(
            last, 2 * last, 3, 1, last, squeeze=2 * last // 16, joined=joined
        )
        self.head = nn.ModuleDict({"fc": nn.Linear(2 * last, out)} if out else {})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.final_conv(self.stages(self.stem(pixel_values))).mean(dim=(2, 3))
        return cast(torch.Tensor, self.head["fc"](pooled) if "fc" in self.head else pooled)


class FastVitVisionTower(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, dim), not normalised.

    Args:
        config: The tower.
        shape: Its architecture.
        dim: Of the embedding.
        joined: The checkpoint holds one convolution for each block's branches.
    """

    def __init__(
        self, config: TimmVisionConfig, shape: FastVitArchitecture, dim: int, *, joined: bool
    ) -> None:
        super().__init__()
        out = 0 if config.projection is not None else dim
        self.trunk = _Trunk(shape, out, joined=joined)
        self.head = adapter(config, 2 * shape.widths[-1], dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images."""
        return cast(torch.Tensor, self.head(self.trunk(pixel_values)))
