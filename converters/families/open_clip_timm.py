"""Vision transformers of timm, as open_clip's checkpoints name them: EVA, SigLIP, PE, CLIP.

Rotary positions turn pairs of values that lie half a head apart, not side by side as in timm: the
rows of the query and key projections are reordered alike, which changes no product of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional

from mmedge.converters.families.open_clip_config import Sides, TimmVisionConfig
from mmedge.converters.families.open_clip_modules import (
    ConvNorm,
    QuickGelu,
    attend,
    linear,
    turned,
)

__all__ = ["TIMM", "TimmArchitecture", "TimmVisionTower", "adapter"]

_TEMPERATURE = 10_000.0


@dataclass(frozen=True)
class TimmArchitecture:
    """A vision transformer of timm.

    Attributes:
        patch: Side of a patch in pixels.
        width: Of a token.
        layers: Blocks.
        heads: Of an attention.
        hidden: Width within an MLP.
        pool: timm's own pooling, where open_clip names none.
        eps: Of the layer norms.
        activation: Of an MLP.
        class_token: There is one, before the patches.
        norm_before: A layer norm before the blocks; patches then have no bias.
        qkv: Projections: `fused` with a bias each, `unbiased_key` fused without one for the keys,
            `separate` and without one for the keys.
        norm_inner: A layer norm before an attention's output projection, and in an MLP (sub-norm).
        gated: SwiGLU in place of an activation.
        norm_behind: Norms behind attention and MLP, not before.
        rotary: Side of the grid of patches that rotary positions are scaled to; 0 for none.
        rotary_offset: Added to a patch's place.
        rotary_xy: Columns come before rows.
        pool_heads: Of a pooling attention.
        stem: Three convolutions make the patches (MobileCLIP).
        class_position: The class token has a position of its own.
    """

    patch: int
    width: int
    layers: int
    heads: int
    hidden: int
    pool: Literal["token", "avg", "map"] = "token"
    eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    class_token: bool = True
    norm_before: bool = False
    qkv: Literal["fused", "unbiased_key", "separate"] = "fused"
    norm_inner: bool = False
    gated: bool = False
    norm_behind: bool = False
    rotary: int = 0
    rotary_offset: float = 0.0
    rotary_xy: bool = False
    pool_heads: int = 0
    stem: bool = False
    class_position: bool = True


def _eva02(patch: int, width: int, layers: int, heads: int, hidden: int) -> TimmArchitecture:
    return TimmArchitecture(
        patch, width, layers, heads, hidden,
        qkv="separate", norm_inner=True, gated=True, rotary=16,
    )  # fmt: skip


def _siglip(
    patch: int, width: int, layers: int, heads: int, hidden: int, *, tanh: bool = False
) -> TimmArchitecture:
    return TimmArchitecture(
        patch, width, layers, heads, hidden, pool="map", class_token=False, pool_heads=heads,
        activation="gelu_tanh" if tanh else "gelu",
    )  # fmt: skip


def _clip(patch: int, width: int, layers: int, heads: int, hidden: int) -> TimmArchitecture:
    return TimmArchitecture(patch, width, layers, heads, hidden, eps=1e-5, norm_before=True)


def _pe(patch: int, width: int, layers: int, heads: int, rotary: int) -> TimmArchitecture:
    return TimmArchitecture(
        patch, width, layers, heads, 4 * width, pool="map", eps=1e-5, norm_before=True,
        rotary=rotary, rotary_offset=1.0, rotary_xy=True, pool_heads=8,
    )  # fmt: skip


_SIGLIP_B, _SIGLIP_L = (16, 768, 12, 12, 3072), (16, 1024, 24, 16, 4096)
_SIGLIP_SO = (1152, 27, 16, 4304)

# By timm's names. The grid of patches follows from the size of the images.
TIMM: dict[str, TimmArchitecture] = {
    "eva02_base_patch16_clip_224": _eva02(16, 768, 12, 12, 2048),
    "eva02_large_patch14_clip_224": _eva02(14, 1024, 24, 16, 2730),
    "eva02_large_patch14_clip_336": _eva02(14, 1024, 24, 16, 2730),
    "eva02_enormous_patch14_clip_224": TimmArchitecture(
        14, 1792, 64, 16, 15_360, qkv="unbiased_key", norm_behind=True
    ),
    "eva_giant_patch14_224": TimmArchitecture(
        14, 1408, 40, 16, 6144, pool="avg", qkv="unbiased_key"
    ),
    "eva_giant_patch14_clip_224": TimmArchitecture(14, 1408, 40, 16, 6144, qkv="unbiased_key"),
    "vit_base_patch32_clip_224": _clip(32, 768, 12, 12, 3072),
    "vit_base_patch16_clip_224": _clip(16, 768, 12, 12, 3072),
    "vit_large_patch14_clip_224": _clip(14, 1024, 24, 16, 4096),
    "vit_large_patch14_clip_336": _clip(14, 1024, 24, 16, 4096),
    "vit_huge_patch14_clip_224": _clip(14, 1280, 32, 16, 5120),
    "vit_base_mci_224": TimmArchitecture(16, 768, 12, 12, 3072, stem=True, class_position=False),
    "vit_base_patch32_siglip_256": _siglip(32, 768, 12, 12, 3072, tanh=True),
    **{f"vit_base_patch16_siglip_{side}": _siglip(*_SIGLIP_B) for side in (224, 256, 384, 512)},
    **{f"vit_large_patch16_siglip_{side}": _siglip(*_SIGLIP_L) for side in (256, 384, 512)},
    **{f"vit_so400m_patch14_siglip_{side}": _siglip(14, *_SIGLIP_SO) for side in (224, 378, 384)},
    **{
        f"vit_so400m_patch16_siglip_{side}": _siglip(16, *_SIGLIP_SO, tanh=True)
        for side in (256, 384, 512)
    },
    **{
        f"vit_giantopt_patch16_siglip_{side}": _siglip(16, 1536, 40, 16, 6144, tanh=True)
        for side in (256, 384)
    },
    "vit_pe_core_tiny_patch16_384": _pe(16, 192, 12, 3, 24),
    "vit_pe_core_small_patch16_384": _pe(16, 384, 12, 6, 24),
    "vit_pe_core_base_patch16_224": _pe(16, 768, 12, 12, 14),
    "vit_pe_core_large_patch14_336": _pe(14, 1024, 24, 16, 24),
}


class _Attention(nn.Module):
    def __init__(self, shape: TimmArchitecture) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.reordered = shape.heads, shape.rotary > 0
        if shape.qkv == "separate":
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=shape.qkv == "fused")
        if shape.qkv == "unbiased_key":
            self.q_bias = nn.Parameter(torch.empty(width))
            self.v_bias = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width, shape.eps) if shape.norm_inner else nn.Identity()
        self.proj = nn.Linear(width, width)

    def unpack(self) -> None:
        """Split a fused projection, and reorder what is turned by rotary positions."""
        if hasattr(self, "qkv"):
            weights = self.qkv.weight.chunk(3)
            biases: list[torch.Tensor | None]
            if hasattr(self, "q_bias"):
                biases = [self.q_bias, None, self.v_bias]
                del self.q_bias, self.v_bias
            else:
                biases = list(self.qkv.bias.chunk(3))
            del self.qkv
            self.q_proj, self.k_proj, self.v_proj = map(linear, weights, biases)
        if self.reordered:
            width = self.q_proj.out_features
            # Of each head, the first values of all pairs, then the second ones.
            order = torch.arange(width).view(self.heads, -1, 2).transpose(1, 2).flatten()
            for name in ("q_proj", "k_proj"):
                old: nn.Linear = getattr(self, name)
                bias: torch.Tensor | None = old.bias
                setattr(
                    self, name, linear(old.weight[order], None if bias is None else bias[order])
                )

    def forward(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turns is not None:
            query, key = turned(query, *turns), turned(key, *turns)
        return cast(torch.Tensor, self.proj(self.norm(attend(query, key, value))))


class _Mlp(nn.Module):
    def __init__(self, shape: TimmArchitecture) -> None:
        super().__init__()
        self.gated = shape.gated
        if shape.gated:
            self.fc1_g = nn.Linear(shape.width, shape.hidden)
            self.fc1_x = nn.Linear(shape.width, shape.hidden)
        else:
            self.fc1 = nn.Linear(shape.width, shape.hidden)
            tanh = "tanh" if shape.activation == "gelu_tanh" else "none"
            quick = shape.activation == "quick_gelu"
            self.act = QuickGelu() if quick else nn.GELU(approximate=tanh)
        self.norm = nn.LayerNorm(shape.hidden, shape.eps) if shape.norm_inner else nn.Identity()
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return cast(torch.Tensor, self.fc2(self.norm(self.act(self.fc1(x)))))
        gated = functional.silu(self.fc1_g(x)) * self.fc1_x(x)
        return cast(torch.Tensor, self.fc2(self.norm(gated)))


class _Block(nn.Module):
    def __init__(self, shape: TimmArchitecture) -> None:
        super().__init__()
        self.behind = shape.norm_behind
        self.norm1 = nn.LayerNorm(shape.width, shape.eps)
        self.attn = _Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width, shape.eps)
        self.mlp = _Mlp(shape)

    def forward(
        self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        if self.behind:
            x = x + self.norm1(self.attn(x, turns))
            return cast(torch.Tensor, x + self.norm2(self.mlp(x)))
        x = x + self.attn(self.norm1(x), turns)
        return cast(torch.Tensor, x + self.mlp(self.norm2(x)))


class _AttentionPool(nn.Module):
    """timm's AttentionPoolLatent with one query: (B, T, width) -> (B, width)."""

    def __init__(self, shape: TimmArchitecture) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.pool_heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, shape.eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, shape.hidden), "fc2": nn.Linear(shape.hidden, width)}
        )
        tanh = shape.activation == "gelu_tanh"
        self.act = nn.GELU(approximate="tanh" if tanh else "none")

    def unpack(self) -> None:
        """Split the projection of keys and values."""
        self.k, self.v = map(linear, self.kv.weight.chunk(2), self.kv.bias.chunk(2))
        del self.kv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent = self.latent.expand(x.shape[0], -1, -1)
        query, key, value = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in ((self.q, latent), (self.k, x), (self.v, x))
        )
        pooled = self.proj(attend(query, key, value))[:, 0]
        hidden = self.act(self.mlp["fc1"](self.norm(pooled)))
        return cast(torch.Tensor, pooled + self.mlp["fc2"](hidden))


def _stem(width: int) -> nn.Sequential:
    """Return MobileCLIP's convolutions: (B, 3, H, W) -> (B, width, H / 16, W / 16)."""
    last = nn.ModuleDict({"conv": nn.Conv2d(width // 4, width, 2, stride=2)})
    return _Stem(
        ConvNorm(3, width // 4, 4, stride=4, padding=0),
        ConvNorm(width // 4, width // 4, 2, stride=2, padding=0),
        last,
    )


class _Stem(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, last = self
        x = functional.gelu(second(functional.gelu(first(x))))
        return cast(torch.Tensor, cast(nn.ModuleDict, last)["conv"](x))


class _Trunk(nn.Module):
    def __init__(
        self, shape: TimmArchitecture, sides: Sides, *, pool: str, behind: bool, out: int
    ) -> None:
        super().__init__()
        self.shape, self.pool = shape, pool
        self.grid = (sides[0] // shape.patch, sides[1] // shape.patch)
        self.leading = int(shape.class_token and shape.class_position)
        width, places = shape.width, self.grid[0] * self.grid[1] + self.leading
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if shape.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, places, width))
        patches = nn.Conv2d(3, width, shape.patch, stride=shape.patch, bias=not shape.norm_before)
        made = {"backbone": _stem(width)} if shape.stem else {"proj": patches}
        self.patch_embed = nn.ModuleDict(made)
        self.norm_pre = nn.LayerNorm(width, shape.eps) if shape.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        # Named by whether timm puts it behind the pooling.
        self.norm = nn.Identity() if behind else nn.LayerNorm(width, shape.eps)
        self.fc_norm = nn.LayerNorm(width, shape.eps) if behind else nn.Identity()
        self.attn_pool = _AttentionPool(shape) if pool == "map" else None
        self.head = nn.Linear(width, out) if out else nn.Identity()

    def unpack(self) -> None:
        """Compute the rotary positions; the class token is not turned."""
        cos, sin = _rotary(self.shape, self.grid)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        (embed,) = self.patch_embed.values()
        x = embed(pixel_values).flatten(2).transpose(1, 2)
        first = None if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1)
        x = x if self.leading else x + self.pos_embed
        x = x if first is None else torch.cat([first, x], dim=1)
        x = self.norm_pre(x + self.pos_embed if self.leading else x)
        turns = (self.cos, self.sin) if self.shape.rotary else None
        for block in self.blocks:
            x = block(x, turns)
        if self.attn_pool is not None:
            pooled = self.attn_pool(self.norm(x))
        elif self.pool == "token":
            pooled = self.norm(x[:, 0])
        else:
            pooled = self.norm(x)[:, int(self.shape.class_token) :].mean(dim=1)
        return cast(torch.Tensor, self.head(self.fc_norm(pooled)))


def _rotary(shape: TimmArchitecture, grid: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of every token and value of a head: (T, D) each."""
    bands = shape.width // shape.heads // 4
    exponents = torch.arange(bands, dtype=torch.float32) / bands
    frequencies = 1.0 / (_TEMPERATURE**exponents)
    rows, columns = (
        (torch.arange(side, dtype=torch.float32) + shape.rotary_offset) / side * shape.rotary
        for side in grid
    )
    places = list(torch.meshgrid(rows, columns, indexing="ij"))
    axes = places[::-1] if shape.rotary_xy else places
    angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in axes], dim=1)
    angles = torch.cat([angles, angles], dim=1)
    prefix = torch.zeros(int(shape.class_token), angles.shape[1])  # an angle of 0 turns nothing
    angles = torch.cat([prefix, angles])
    return angles.cos(), angles.sin()


class TimmVisionTower(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, dim), not normalised.

    Args:
        config: The tower.
        shape: Its architecture.
        dim: Of the embedding.
    """

    def __init__(self, config: TimmVisionConfig, shape: TimmArchitecture, dim: int) -> None:
        super().__init__()
        projected = config.projection in {"linear", "mlp"}
        pool = config.pool or shape.pool
        # timm is made with open_clip's pooling only where open_clip adds no projection of its own.
        behind = (shape.pool if projected else pool) == "avg"
        out = 0 if projected or config.projection == "none" else dim
        self.trunk = _Trunk(shape, config.image_size, pool=pool, behind=behind, out=out)
        self.head = adapter(config, shape.width, dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images."""
        return cast(torch.Tensor, self.head(self.trunk(pixel_values)))


def adapter(config: TimmVisionConfig, width: int, dim: int) -> nn.Sequential:
    """Return open_clip's projection behind a tower of timm: (B, width) -> (B, dim).

    Args:
        config: The tower.
        width: Of its output.
        dim: Of the embedding.
    """
    head, bias = nn.Sequential(), config.projection_bias
    if config.projection == "linear":
        head.add_module("proj", nn.Linear(width, dim, bias=bias))
    elif config.projection == "mlp":
        mlp = nn.Sequential()
        mlp.add_module("fc1", nn.Linear(width, 2 * dim))
        mlp.add_module("act", nn.GELU())
        mlp.add_module("fc2", nn.Linear(2 * dim, dim, bias=bias))
        head.add_module("mlp", mlp)
    return head
