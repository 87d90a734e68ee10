"""EVA-CLIP in BAAI's layout: transformers' format, own classes (Sun et al., 2023 and 2024).

Its `config.json` says `clip` and names the class EvaCLIPModel, whose code lies beside the weights.
That code is not run: the modules here have its tensors' names and compute the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from mmedge.converters.families.clip_text import ClipFamily
from mmedge.converters.families.loading import check_tensors, read_architecture, read_tensors
from mmedge.converters.families.open_clip_modules import (
    QuickGelu,
    attend,
    linear,
    turned,
    unpack,
)
from mmedge.converters.families.towers import Tower, image_role
from mmedge.converters.sources.config import Fields
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import load_tokenizer

__all__ = ["FAMILY"]

_ACTIVATIONS: dict[object, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGelu}
_FLAGS = {"q_bias": True, "k_bias": True, "v_bias": True, "post_layernorm": False,
          "use_rope": False, "use_swiglu_mlp": False, "use_rms_norm": False,
          "use_sub_ln": False}  # fmt: skip


@dataclass(frozen=True)
class _Blocks:
    """One tower's configuration; keys that a file lacks have the defaults of BAAI's classes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    q_bias: bool
    k_bias: bool
    v_bias: bool
    post_layernorm: bool
    use_rope: bool
    use_swiglu_mlp: bool
    use_rms_norm: bool
    use_sub_ln: bool
    grid: int = 0
    rope_theta: float = 10_000.0
    pretrained_seq_len: int = 16

    def norm(self, size: int) -> nn.Module:
        """Return a norm over `size` values."""
        made = _RmsNorm if self.use_rms_norm else nn.LayerNorm
        return made(size, self.layer_norm_eps)


@dataclass(frozen=True)
class _Config:
    """What the outputs depend on, beside the tensors."""

    vision: _Blocks
    text: _Blocks
    patch_size: int
    projection_dim: int
    vision_config: Any = dataclasses.field(compare=False, repr=False)
    text_config: Any = dataclasses.field(compare=False, repr=False)


class _RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _Attention(nn.Module):
    def __init__(self, config: _Blocks) -> None:
        super().__init__()
        width, self.heads, self.reordered = (
            config.hidden_size, config.num_attention_heads, config.use_rope
        )  # fmt: skip
        self.q_proj = nn.Linear(width, width, config.q_bias)
        self.k_proj = nn.Linear(width, width, config.k_bias)
        self.v_proj = nn.Linear(width, width, config.v_bias)
        self.inner_attn_ln = config.norm(width) if config.use_sub_ln else nn.Identity()
        self.out_proj = nn.Linear(width, width)

    def unpack(self) -> None:
        """Reorder queries and keys: pairs that are turned lie half a head apart, not side by side.

        Both are reordered alike, which changes no product of the two.
        """
        if not self.reordered:
            return
        order = torch.arange(self.q_proj.out_features).view(self.heads, -1, 2)
        order = order.transpose(1, 2).flatten()
        for name in ("q_proj", "k_proj"):
            old: nn.Linear = getattr(self, name)
            bias: torch.Tensor | None = old.bias
            setattr(self, name, linear(old.weight[order], None if bias is None else bias[order]))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turns is not None:
            query, key = turned(query, *turns), turned(key, *turns)
        return cast(
            torch.Tensor, self.out_proj(self.inner_attn_ln(attend(query, key, value, mask)))
        )


class _Mlp(nn.Module):
    def __init__(self, config: _Blocks) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gated = config.use_swiglu_mlp
        self.fc1 = nn.Linear(width, hidden)
        if self.gated:
            self.fc2, self.fc3 = nn.Linear(width, hidden), nn.Linear(hidden, width)
            norm = config.norm(hidden)
        else:
            self.fc2, self.act = nn.Linear(hidden, width), _ACTIVATIONS[config.hidden_act]()
            norm = nn.LayerNorm(hidden)
        self.ffn_ln = norm if config.use_sub_ln else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            gated = functional.silu(self.fc1(x)) * self.fc2(x)
            return cast(torch.Tensor, self.fc3(self.ffn_ln(gated)))
        return cast(torch.Tensor, self.fc2(self.ffn_ln(self.act(self.fc1(x)))))


class _Block(nn.Module):
    def __init__(self, config: _Blocks) -> None:
        super().__init__()
        self.behind = config.post_layernorm
        self.self_attn, self.mlp = _Attention(config), _Mlp(config)
        self.layer_norm1 = config.norm(config.hidden_size)
        self.layer_norm2 = config.norm(config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        turns: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if self.behind:
            x = x + self.layer_norm1(self.self_attn(x, mask, turns))
            return cast(torch.Tensor, x + self.layer_norm2(self.mlp(x)))
        x = x + self.self_attn(self.layer_norm1(x), mask, turns)
        return cast(torch.Tensor, x + self.mlp(self.layer_norm2(x)))


def _encoder(config: _Blocks) -> nn.ModuleDict:
    blocks = (_Block(config) for _ in range(config.num_hidden_layers))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


class _VisionTower(nn.Module):
    """pixel_values (B, 3, H, W) -> pooled (B, width)."""

    def __init__(self, config: _Blocks, patch: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.embeddings.position_embedding = nn.Embedding(config.grid**2 + 1, width)
        self.encoder = _encoder(config)
        self.post_layernorm = config.norm(width)
        self.config = config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings: Any = self.embeddings
        x = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = embeddings.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + embeddings.position_embedding.weight
        turns = self._turns() if self.config.use_rope else None
        for block in cast(nn.ModuleList, self.encoder["layers"]):
            x = block(x, None, turns)
        return cast(torch.Tensor, self.post_layernorm(x[:, 0]))

    def _turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (1 + patches, D) of each place; the first is not turned."""
        config = self.config
        pairs = config.hidden_size // config.num_attention_heads // 4
        at = torch.arange(config.grid) / config.grid * config.pretrained_seq_len
        angles = at[:, None] / config.rope_theta ** (torch.arange(pairs) / pairs)
        rows = angles[:, None].expand(-1, config.grid, -1)
        both = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1).repeat(1, 2)
        both = torch.cat([torch.zeros_like(both[:1]), both])
        return both.cos(), both.sin()


class _TextTower(nn.Module):
    """input_ids (B, T) -> pooled (B, width): causal, read at the highest id."""

    def __init__(self, config: _Blocks, rows: int, context: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(rows, width)
        self.embeddings.position_embedding = nn.Embedding(context, width)
        self.encoder = _encoder(config)
        self.final_layer_norm = config.norm(width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings: Any = self.embeddings
        length = input_ids.shape[1]
        x = embeddings.token_embedding(input_ids) + embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), -torch.inf).triu(1)
        for block in cast(nn.ModuleList, self.encoder["layers"]):
            x = block(x, mask)
        pooled = x[torch.arange(x.shape[0]), input_ids.argmax(dim=-1)]
        return cast(torch.Tensor, self.final_layer_norm(pooled))


class _Model(nn.Module):
    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.config, text = config, config.text_config
        self.vision_model = _VisionTower(config.vision, config.patch_size)
        self.text_model = _TextTower(config.text, text.vocab_size, text.max_position_embeddings)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))


class _Encoder(nn.Module):
    """A tower, projected and L2-normalised."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.projection(self.tower(item)), dim=-1)


class EvaClip(ClipFamily):
    """EVA-CLIP as BAAI publishes it, both towers."""

    name = "eva_clip"
    class_prefix = "EvaCLIP"
    pools_at_highest = True

    def matches(self, source: Source) -> bool:
        """Return whether a source says that it is an EvaCLIPModel."""
        return source.model_type == "clip" and source.config.get("architectures") == [
            "EvaCLIPModel"
        ]

    def load(self, source: Source) -> nn.Module:
        """Load both towers in fp32 from the checkpoint's tensors, none missing and none left."""
        config = _read_config(source)
        self.image_config(source)
        self.text_config(source, load_tokenizer(source))
        with torch.device("meta"):
            model = _Model(config)
        weights = read_tensors(source)
        check_tensors(source, model, weights)
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        unpack(model)
        return model.eval().requires_grad_(requires_grad=False)

    def image_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the image tower."""
        encoder = _Encoder(model.vision_model, model.visual_projection)
        return Tower(
            role=lambda: image_role(encoder, model.config.vision_config, dim),
            processor=self.image_config(source),
            reference=None,
        )

    def text_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the text tower, without an attention mask: it is causal."""
        usual = super().text_tower(source, model, dim)
        encoder = _Encoder(model.text_model, model.text_projection)
        return replace(usual, role=lambda: replace(usual.role(), module=encoder), reference=None)

    def _has(self, source: Source, part: str) -> bool:  # noqa: ARG002
        return True


def _read_config(source: Source) -> _Config:
    """Read `config.json`.

    Raises:
        SourceError: If a value is missing or not one that BAAI's classes take.
    """
    known: Any = read_architecture(source)
    vision = _section(source, "vision_config", known.vision_config)
    text = _section(source, "text_config", known.text_config)
    patch = vision.integer("patch_size", 1, 1 << 10)
    side = vision.integer("image_size", patch, 1 << 14)
    vision.integer("num_channels", 3, 3)
    if text.flag("use_rope"):
        raise text.error("use_rope", "false: texts have learned positions")
    rotary = {}
    if vision.flag("use_rope"):
        rotary = {
            "rope_theta": vision.number("rope_theta", 0, 1e9),
            "pretrained_seq_len": vision.integer("pretrained_seq_len", 1, 1 << 10),
        }
        if (
            vision.integer("hidden_size", 1, 1 << 17)
            // vision.integer("num_attention_heads", 1, 1 << 12)
            % 4
        ):
            raise vision.error("num_attention_heads", "heads of a multiple of 4 values")
    return _Config(
        vision=_blocks(vision, grid=side // patch, **rotary),
        text=_blocks(text),
        patch_size=patch,
        projection_dim=source.fields.integer("projection_dim", 1, 1 << 17),
        vision_config=known.vision_config,
        text_config=known.text_config,
    )


def _section(source: Source, part: str, known: Any) -> Fields:  # noqa: ANN401
    given = source.fields.section(part)
    values = {} if given is None else {k: v for k, v in given.values.items() if v is not None}
    defaults = {"hidden_act": "gelu", "rope_theta": 10_000.0, "pretrained_seq_len": 16}
    return Fields(
        source.fields.file, {**known.to_dict(), **_FLAGS, **defaults, **values}, f"{part}."
    )


def _blocks(fields: Fields, grid: int = 0, **rotary: Any) -> _Blocks:  # noqa: ANN401
    flags = {name: fields.flag(name) for name in _FLAGS}
    return _Blocks(
        hidden_size=fields.integer("hidden_size", 1, 1 << 17),
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_hidden_layers=fields.integer("num_hidden_layers", 1, 4096),
        num_attention_heads=fields.integer("num_attention_heads", 1, 1 << 12),
        hidden_act=fields.choice("hidden_act", {name: str(name) for name in _ACTIVATIONS}),
        layer_norm_eps=fields.number("layer_norm_eps", 0, 1),
        grid=grid,
        **flags,
        **rotary,
    )


FAMILY = EvaClip()
