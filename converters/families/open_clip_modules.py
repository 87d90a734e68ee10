"""open_clip's own towers in PyTorch, with the names of its checkpoints.

Modules are made on the meta device, take the checkpoint's tensors by name, and are then unpacked:
one projection each for queries, keys and values, which the passes over exported graphs know.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from mmedge.converters.families.open_clip_config import BlockConfig, NativeVisionConfig, TextConfig

__all__ = [
    "BatchNorm",
    "ConvNorm",
    "NativeTextTower",
    "NativeVisionTower",
    "QuickGelu",
    "attend",
    "convolution",
    "linear",
    "turned",
    "unpack",
]

_ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate."""
        return x * torch.sigmoid(1.702 * x)


class _Scale(nn.Module):
    """x * gamma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention's output with the heads joined.

    Args:
        query: (B, heads, T, D).
        key: (B, heads, S, D).
        value: (B, heads, S, D).
        mask: Added to the scores, (B or 1, 1, T, S); -inf where a key is not seen.

    Returns:
        (B, T, heads * D).
    """
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of values that lie half a head apart: x (B, heads, T, D), cos and sin (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head attention with the parameters of nn.MultiheadAttention.

    Args:
        width: Of queries and of the output.
        heads: Number of heads.
        context: Width of keys and values.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        if context == width:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(width, width))
            self.k_proj_weight = nn.Parameter(torch.empty(width, context))
            self.v_proj_weight = nn.Parameter(torch.empty(width, context))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def unpack(self) -> None:
        """Turn the joint projection into `query`, `key` and `value`."""
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        packed = hasattr(self, "in_proj_weight")
        weights = (
            self.in_proj_weight.chunk(3) if packed else [getattr(self, each) for each in names]
        )
        for name, weight, bias in zip(
            ("query", "key", "value"), weights, self.in_proj_bias.chunk(3), strict=True
        ):
            setattr(self, name, linear(weight, bias))
        for name in ("in_proj_weight", *names, "in_proj_bias"):
            if hasattr(self, name):
                delattr(self, name)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> (B, heads, T, width / heads)."""
        batch, length, width = x.shape
        return x.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(
        self,
        queries: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T, width), (B, S, context) -> (B, T, width)."""
        query = self.split(self.query(queries))
        key, value = self.split(self.key(context)), self.split(self.value(context))
        joined = attend(query, key, value, mask)
        return cast(torch.Tensor, self.out_proj(joined))


class _CustomAttention(Attention):
    """open_clip's attention with its optional norms and scales."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config.width, config.heads, config.width)
        size = config.width // config.heads
        self.ln_q = nn.LayerNorm(size, config.eps) if config.qk_norm else nn.Identity()
        self.ln_k = nn.LayerNorm(size, config.eps) if config.qk_norm else nn.Identity()
        self.head_scale = (
            nn.Parameter(torch.empty(config.heads, 1, 1)) if config.scale_heads else None
        )
        self.ln_inner = (
            nn.LayerNorm(config.width, config.eps) if config.scale_attn_inner else nn.Identity()
        )

    def forward(
        self,
        queries: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key = self.ln_q(self.split(self.query(queries))), self.split(self.key(context))
        value = self.split(self.value(context))
        if self.head_scale is not None:  # scales a head's output, which is linear in its values
            value = value * self.head_scale
        joined = attend(query, self.ln_k(key), value, mask)
        return cast(torch.Tensor, self.out_proj(self.ln_inner(joined)))


class _Block(nn.Module):
    def __init__(self, config: BlockConfig) -> None:
        super().__init__()

        def norm(size: int, *, there: bool = True) -> nn.Module:
            return nn.LayerNorm(size, config.eps) if there else nn.Identity()

        scaled = config.layer_scale
        self.ln_1 = norm(config.width)
        self.attn = _CustomAttention(config)
        self.ln_attn = norm(config.width, there=config.scale_attn)
        self.ls_1 = _Scale(config.width) if scaled else nn.Identity()
        self.ln_2 = norm(config.width)
        quick = config.activation == "quick_gelu"
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(config.width, config.hidden),
                gelu=QuickGelu() if quick else _ACTIVATIONS[config.activation](),
                ln=norm(config.hidden, there=config.scale_fc),
                c_proj=nn.Linear(config.hidden, config.width),
            )
        )
        self.ls_2 = _Scale(config.width) if scaled else nn.Identity()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.ls_1(self.ln_attn(self.attn(normed, normed, mask)))
        return cast(torch.Tensor, x + self.ls_2(self.mlp(self.ln_2(x))))


class _Transformer(nn.Module):
    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(config) for _ in range(config.layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _AttentionPool(nn.Module):
    """Queries that read the tokens: (B, T, context) -> (B, queries, width).

    A query sees no other, so those that the pooled ones do not need are dropped by `keep`.
    """

    def __init__(self, width: int, context: int, queries: int, heads: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.attn = Attention(width, heads, context)
        self.ln_q = nn.LayerNorm(width, eps)
        self.ln_k = nn.LayerNorm(context, eps)

    def keep(self, rows: slice) -> None:
        """Keep some of the queries."""
        self.query = nn.Parameter(self.query[rows].clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.ln_q(self.query).expand(x.shape[0], -1, -1)
        return cast(torch.Tensor, self.attn(queries, self.ln_k(x)))


class NativeVisionTower(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, dim), not normalised.

    Args:
        config: The tower.
        dim: Of the embedding.
    """

    def __init__(self, config: NativeVisionConfig, dim: int) -> None:
        super().__init__()
        blocks = config.blocks
        grid = [
            side // patch for side, patch in zip(config.image_size, config.patch_size, strict=True)
        ]
        self.config = config
        self.conv1 = nn.Conv2d(
            3, blocks.width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(blocks.width))
        self.positional_embedding = nn.Parameter(torch.empty(grid[0] * grid[1] + 1, blocks.width))
        self.ln_pre = (
            nn.LayerNorm(blocks.width, blocks.eps) if config.norm_before else nn.Identity()
        )
        self.transformer = _Transformer(blocks)
        attended = config.attention_pool
        # The pooling attention has open_clip's own eps, whatever the blocks have.
        self.attn_pool = attended and _AttentionPool(dim, blocks.width, *attended, 1e-5)
        pooled = dim if attended else blocks.width
        self.ln_post = nn.LayerNorm(pooled, blocks.eps)
        self.proj = nn.Parameter(torch.empty(pooled, dim))

    def unpack(self) -> None:
        """Drop the queries of the pooling attention that pooling does not read."""
        if self.attn_pool is not None:
            self.attn_pool.keep(slice(0, 1) if self.config.pool == "tok" else slice(1, None))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        if self.attn_pool is not None:
            x = self.ln_post(self.attn_pool(x))
            pooled = x[:, 0] if self.config.pool == "tok" else x.mean(dim=1)
        elif self.config.pool == "tok":
            pooled = self.ln_post(x[:, 0])
        elif self.config.norm_after_pool:
            pooled = self.ln_post(x[:, 1:].mean(dim=1))
        else:
            pooled = self.ln_post(x)[:, 1:].mean(dim=1)
        return cast(torch.Tensor, pooled @ self.proj)


class NativeTextTower(nn.Module):
    """input_ids (B, T) int64 -> embedding (B, dim), not normalised.

    Args:
        config: The tower.
        dim: Of the embedding.
    """

    def __init__(self, config: TextConfig, dim: int) -> None:
        super().__init__()
        width, eps = config.blocks.width, config.blocks.eps
        self.config = config
        self.token_embedding = nn.Embedding(config.rows, width)
        self.cls_emb = nn.Parameter(torch.empty(width)) if config.class_token else None
        places = config.context + config.class_token
        self.positional_embedding = nn.Parameter(torch.empty(places, width))
        self.transformer = _Transformer(config.blocks)
        self.ln_final = nn.LayerNorm(width, eps)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.projected and config.projection_bias:
            self.text_projection = nn.Linear(width, dim)
        elif config.projected:
            self.text_projection = nn.Parameter(torch.empty(width, dim))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode texts."""
        x = self.token_embedding(input_ids)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.expand(x.shape[0], 1, -1)], dim=1)
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.transformer(x, self._mask(input_ids, x.shape[1]))
        pooled = self.ln_final(self._pool(x, input_ids))
        if self.text_projection is None:
            return cast(torch.Tensor, pooled)
        if isinstance(self.text_projection, nn.Linear):
            return cast(torch.Tensor, self.text_projection(pooled))
        return cast(torch.Tensor, pooled @ self.text_projection)

    def _mask(self, input_ids: torch.Tensor, length: int) -> torch.Tensor | None:
        """Return 0 where a token sees another, else -inf: (B or 1, 1, length, length)."""
        places, seen = torch.arange(length), None
        if self.config.causal:
            seen = (places <= places[:, None])[None, None]
        if self.config.class_token:
            # open_clip's mask is one place too late, and its weights are trained so: a key is
            # hidden where the token before it is padding.
            first = torch.ones_like(input_ids[:, :1], dtype=torch.bool)
            tokens = torch.cat([first, input_ids != self.config.pad_id], dim=1)[:, None, None]
            seen = tokens.expand(-1, -1, length, -1) if seen is None else seen & tokens
        return None if seen is None else torch.where(seen, 0.0, -torch.inf)

    def _pool(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        pool = "last" if self.config.class_token else self.config.pool
        if pool in {"first", "last"}:
            return x[:, 0 if pool == "first" else -1]
        sought = input_ids if pool == "argmax" else (input_ids == self.config.eos_id).int()
        return x[torch.arange(x.shape[0]), sought.argmax(dim=-1)]


class BatchNorm(nn.Module):
    """The tensors of a batch norm, to be joined with a layer beside it."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return its factor and its offset, by channel."""
        factor = self.weight / (self.running_var + 1e-5).sqrt()
        return factor, self.bias - self.running_mean * factor


class ConvNorm(nn.Module):
    """A convolution and its batch norm, joined by `unpack`.

    Args:
        before: Channels of the input.
        width: Channels of the output.
        kernel: Height and width.
        stride: Of the convolution.
        groups: Of the convolution.
        padding: Of the input; None for half the kernel.
    """

    def __init__(
        self,
        before: int,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            before, width, kernel, stride, padding=padding, groups=groups, bias=False
        )
        self.bn = BatchNorm(width)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kernel and bias of both."""
        factor, offset = self.bn.affine()
        return self.conv.weight * factor[:, None, None, None], offset

    def unpack(self) -> None:
        """Turn both into one convolution with a bias."""
        kernel, bias = self.joined()
        self.conv = convolution(
            kernel, bias, int(self.conv.stride[0]), self.conv.groups, int(self.conv.padding[0])
        )
        del self.bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) -> (B, width, ...)."""
        return cast(torch.Tensor, self.conv(x))


def convolution(
    kernel: torch.Tensor, bias: torch.Tensor, stride: int, groups: int, padding: int | None = None
) -> nn.Conv2d:
    """Return a convolution with its own copies of kernel and bias; padding None for half of it."""
    out, inputs, height, width = kernel.shape
    padding = height // 2 if padding is None else padding
    layer = nn.Conv2d(
        inputs * groups, out, (height, width), stride, padding=padding, groups=groups, device="meta"
    )
    layer.weight = nn.Parameter(kernel.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def unpack(model: nn.Module) -> None:
    """Turn a model that holds a checkpoint's tensors into the one that is exported."""
    for module in list(model.modules()):
        if (step := getattr(module, "unpack", None)) is not None:
            step()


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a layer with its own copies of the weight (out, in) and the bias (out), if any."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made
