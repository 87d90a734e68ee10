"""Typed reading of `open_clip_config.json`: every key is read, known to be inert, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmedge.converters.sources.config import Fields

__all__ = [
    "BlockConfig",
    "ModelConfig",
    "NativeVisionConfig",
    "Sides",
    "TextConfig",
    "TimmVisionConfig",
    "read_model_config",
]

Sides: TypeAlias = tuple[int, int]

_MAX_SIDE = 1 << 13
_MAX_WIDTH = 1 << 17
# Defaults of open_clip's CLIPVisionCfg, CLIPTextCfg and CLIP, which a file need not repeat.
_BLOCK_DEFAULTS: Mapping[str, object] = {
    "layers": 12, "mlp_ratio": 4.0, "ls_init_value": None, "act_kwargs": None, "norm_kwargs": None,
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "output_tokens": False,
}  # fmt: skip
_VISION_DEFAULTS: Mapping[str, object] = {
    **_BLOCK_DEFAULTS, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224,
    "patch_dropout": 0.0, "attentional_pool": False, "attn_pooler_queries": 256,
    "attn_pooler_heads": 8, "no_ln_pre": False, "pos_embed_type": "learnable",
    "final_ln_after_pool": False, "pool_type": "tok", "timm_model_name": None,
    "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear",
    "timm_proj_bias": False, "timm_drop": 0.0, "timm_drop_path": None,
}  # fmt: skip
_TEXT_DEFAULTS: Mapping[str, object] = {
    **_BLOCK_DEFAULTS, "context_length": 77, "vocab_size": 49_408, "hf_tokenizer_name": None,
    "tokenizer_mode": None, "tokenizer_kwargs": None, "width": 512, "heads": 8, "embed_cls": False,
    "pad_id": 0, "eos_id": 2, "no_causal_mask": False, "final_ln_after_pool": False,
    "pool_type": "argmax", "proj_bias": False, "proj_type": "linear", "hf_model_name": None,
    "hf_model_pretrained": True, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler",
}  # fmt: skip
_MODEL_DEFAULTS: Mapping[str, object] = {
    "embed_dim": None, "vision_cfg": None, "text_cfg": None, "multimodal_cfg": None,
    "quick_gelu": False, "custom_text": False, "init_logit_scale": None, "init_logit_bias": None,
    "nonscalar_logit_scale": False, "output_dict": False, "pad_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class BlockConfig:
    """Transformer blocks of open_clip.

    Attributes:
        width: Of a token.
        layers: Blocks.
        heads: Of an attention.
        hidden: Width within an MLP.
        activation: Of an MLP: `gelu_tanh` is GELU's approximation, `quick_gelu` is
            x * sigmoid(1.702 x).
        eps: Of the layer norms.
        layer_scale: A learned scale behind attention and MLP.
        qk_norm: Layer norms over queries and keys.
        scale_heads: A learned scale for each head.
        scale_attn_inner: A layer norm before an attention's output projection.
        scale_attn: A layer norm behind an attention.
        scale_fc: A layer norm within an MLP.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    eps: float = 1e-5
    layer_scale: bool = False
    qk_norm: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


@dataclass(frozen=True)
class NativeVisionConfig:
    """open_clip's own vision transformer.

    Attributes:
        image_size: Height and width.
        patch_size: Height and width.
        blocks: Its blocks.
        norm_before: A layer norm before the blocks.
        pool: The class token, or the mean of the others.
        norm_after_pool: The last layer norm is behind the mean.
        attention_pool: Queries and heads of a pooling attention; None for none.
    """

    image_size: Sides
    patch_size: Sides
    blocks: BlockConfig
    norm_before: bool
    pool: Literal["tok", "avg"]
    norm_after_pool: bool
    attention_pool: tuple[int, int] | None


@dataclass(frozen=True)
class TimmVisionConfig:
    """A vision tower of timm.

    Attributes:
        image_size: Height and width that images are brought to.
        name: Of the model in timm.
        pool: What open_clip passes on as pooling.
        projection: Behind the tower; None for the tower's own head.
        projection_bias: The last layer of that projection has a bias.
    """

    image_size: Sides
    name: str
    pool: str
    projection: Literal["linear", "mlp", "none"] | None
    projection_bias: bool


@dataclass(frozen=True)
class TextConfig:
    """A text tower: open_clip's own, or one of transformers.

    Attributes:
        context: Tokens of a text.
        rows: Of the embedding table.
        blocks: Its blocks; without meaning for a tower of transformers.
        causal: A token sees those before it alone.
        class_token: A learned token behind the text, which is pooled (CoCa).
        pad_id: What the class token's mask takes for padding.
        eos_id: What pooling at `eos` looks for.
        pool: Which token is pooled.
        projected: There is a projection to the embedding.
        projection_bias: It has a bias.
        tokenizer: The tokenizer's name on the hub; None for open_clip's own.
        cleaning: Of texts, by open_clip's name.
        strip_separator: The separator's id becomes 0.
        hf_model: Name on the hub of a tower of transformers; None for open_clip's own.
        hf_projection: Behind that tower.
        hf_pooler: Of that tower.
    """

    context: int
    rows: int
    blocks: BlockConfig
    causal: bool
    class_token: bool
    pad_id: int
    eos_id: int
    pool: Literal["first", "last", "argmax", "eos"]
    projected: bool
    projection_bias: bool
    tokenizer: str | None
    cleaning: Literal["lower", "whitespace", "canonicalize"]
    strip_separator: bool
    hf_model: str | None
    hf_projection: Literal["linear", "mlp"] | None
    hf_pooler: str | None


@dataclass(frozen=True)
class ModelConfig:
    """A dual encoder of open_clip.

    Attributes:
        dim: D of the embedding.
        vision: The image tower.
        text: The text tower.
        biased: Scores have a bias, as SigLIP's do.
        decoder: The checkpoint holds a text decoder too, which is not converted.
        text_architecture: transformers' configuration of the text tower, where it is one of those.
    """

    dim: int
    vision: NativeVisionConfig | TimmVisionConfig
    text: TextConfig
    biased: bool
    decoder: bool
    text_architecture: object = None


def read_model_config(file: Fields, tensors: int) -> ModelConfig:
    """Read the architecture.

    Args:
        file: The whole `open_clip_config.json`.
        tensors: How many tensors the checkpoint holds.

    Raises:
        SourceError: If a key is unknown, of the wrong type, or asks for what mmedge does not have.
    """
    section = file.section("model_cfg")
    if section is None:
        raise file.error("model_cfg", "the architecture")
    model = _filled(section, _MODEL_DEFAULTS)
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    if vision is None or text is None:
        raise model.error("vision_cfg" if vision is None else "text_cfg", "a tower")
    decoder = model.values["multimodal_cfg"] is not None
    custom = model.flag("custom_text") or text.values.get("hf_model_name") is not None
    quick = model.flag("quick_gelu")
    read = _read_text(_filled(text, _TEXT_DEFAULTS), tensors, quick_gelu=quick)
    if read.class_token and not custom:
        raise model.error("custom_text", "true: open_clip drops the class token without it")
    return ModelConfig(
        dim=model.integer("embed_dim", 1, _MAX_WIDTH),
        vision=_read_vision(_filled(vision, _VISION_DEFAULTS), tensors, quick_gelu=quick),
        text=read,
        biased=model.values["init_logit_bias"] is not None,
        decoder=decoder and custom,
    )


def _filled(section: Fields, defaults: Mapping[str, object]) -> Fields:
    """Return a section with open_clip's defaults; a key that open_clip does not know is refused."""
    for key in section.values.keys() - defaults.keys():
        raise section.error(key, "a key that open_clip 3 knows", "Remove it, or report the model.")
    return Fields(section.file, {**defaults, **section.values}, section.path)


def _read_blocks(tower: Fields, heads: int, tensors: int, *, quick_gelu: bool) -> BlockConfig:
    width = tower.integer("width", 1, _MAX_WIDTH)
    if width % heads:
        raise tower.error("width", f"a multiple of its {heads} heads")
    if tower.flag("scaled_cosine_attn"):
        raise tower.error("scaled_cosine_attn", "false: open_clip cannot run it either")
    names: Mapping[object, str] = {None: "auto", "default": "default", "custom": "custom"}
    plain = tower.choice("block_type", names) == "default"
    approximate = _only(tower, "act_kwargs", "approximate")
    if approximate is not None and quick_gelu:
        raise tower.error("act_kwargs", "null, as the activation is quick_gelu")
    activations: Mapping[object, Literal["gelu", "gelu_tanh"]] = {
        None: "gelu", "none": "gelu", "tanh": "gelu_tanh",
    }  # fmt: skip
    if isinstance(approximate, (list, dict)) or approximate not in activations:
        raise tower.error("act_kwargs", 'approximate "tanh" or "none"')
    hidden = int(width * tower.number("mlp_ratio", 0, 1 << 10))
    if hidden < 1:
        raise tower.error("mlp_ratio", f"at least 1 / {width}")
    norm = Fields(tower.file, {"eps": _only(tower, "norm_kwargs", "eps")}, tower.path)
    return BlockConfig(
        width=width,
        layers=tower.integer("layers", 1, tensors),
        heads=heads,
        hidden=hidden,
        activation="quick_gelu" if quick_gelu else activations[approximate],
        eps=1e-5 if norm.values["eps"] is None else norm.number("eps", 0, 1),
        layer_scale=tower.values["ls_init_value"] is not None,
        qk_norm=tower.flag("qk_norm") and not plain,
        scale_heads=tower.flag("scale_heads") and not plain,
        scale_attn_inner=tower.flag("scale_attn_inner") and not plain,
        scale_attn=tower.flag("scale_attn") and not plain,
        scale_fc=tower.flag("scale_fc") and not plain,
    )


def _only(tower: Fields, key: str, name: str) -> object:
    """Return the one known value of an object of arguments, None without it."""
    section = tower.section(key)
    if section is None:
        return None
    for other in section.values.keys() - {name}:
        raise section.error(other, f"no argument but {name}")
    return section.values.get(name)


def _read_sides(tower: Fields, key: str) -> Sides:
    sides = tower.integers(key, 1, _MAX_SIDE)
    if len(sides) > 2:
        raise tower.error(key, "one side, or height and width")
    return sides[0], sides[-1]


def _read_vision(
    vision: Fields, tensors: int, *, quick_gelu: bool
) -> NativeVisionConfig | TimmVisionConfig:
    image = _read_sides(vision, "image_size")
    if vision.values["timm_model_name"] is not None:
        projections: Mapping[object, Literal["linear", "mlp", "none"] | None] = {
            None: None, "": None, "linear": "linear", "mlp": "mlp", "none": "none",
        }  # fmt: skip
        return TimmVisionConfig(
            image_size=image,
            name=vision.text("timm_model_name"),
            pool=vision.choice("timm_pool", {name: name for name in ("", "token", "avg", "map")}),
            projection=vision.choice("timm_proj", projections),
            projection_bias=vision.flag("timm_proj_bias"),
        )
    if not isinstance(vision.values["layers"], int):
        raise vision.error("layers", "a number: mmedge has no ResNet of open_clip")
    patch = _read_sides(vision, "patch_size")
    if patch[0] > image[0] or patch[1] > image[1]:
        raise vision.error("patch_size", f"no more than image_size {image}")
    vision.choice("pos_embed_type", {"learnable": 0, "sin_cos_2d": 1})  # stored in either case
    width = vision.integer("width", 1, _MAX_WIDTH)
    heads = width // vision.integer("head_width", 1, width)
    pools: Mapping[object, Literal["tok", "avg"]] = {"tok": "tok", "avg": "avg"}
    attended = vision.values["attentional_pool"]
    if not isinstance(attended, bool):
        raise vision.error("attentional_pool", "true or false: other kinds give no embedding")
    pool = (
        vision.integer("attn_pooler_queries", 2, 1 << 12),
        vision.integer("attn_pooler_heads", 1, 1 << 12),
    )
    return NativeVisionConfig(
        image_size=image,
        patch_size=patch,
        blocks=_read_blocks(vision, heads, tensors, quick_gelu=quick_gelu),
        norm_before=not vision.flag("no_ln_pre"),
        pool=vision.choice("pool_type", pools),
        norm_after_pool=vision.flag("final_ln_after_pool"),
        attention_pool=pool if attended else None,
    )


def _read_text(text: Fields, tensors: int, *, quick_gelu: bool) -> TextConfig:
    if text.values["tokenizer_mode"] not in (None, ""):
        raise text.error("tokenizer_mode", "null: mmedge has none of its modes")
    arguments = text.section("tokenizer_kwargs") or Fields(text.file, {}, text.path)
    for key in arguments.values.keys() - {"clean", "strip_sep_token"}:
        raise arguments.error(key, "clean and strip_sep_token alone")
    tokenizer = None if not text.values["hf_tokenizer_name"] else text.text("hf_tokenizer_name")
    cleanings: Mapping[object, Literal["lower", "whitespace", "canonicalize"]] = {
        None: "lower" if tokenizer is None else "whitespace",
        "lower": "lower", "whitespace": "whitespace", "canonicalize": "canonicalize",
    }  # fmt: skip
    clean = Fields(text.file, {"clean": None, **arguments.values}, arguments.path)
    if arguments.flag("strip_sep_token") and tokenizer is None:
        raise arguments.error("strip_sep_token", "false: open_clip's own tokenizer has none")
    rows = text.integer("vocab_size", 1, 1 << 24)
    pools: Mapping[object, Literal["first", "last", "argmax", "eos"]] = {
        "first": "first", "last": "last", "argmax": "argmax", "eos": "eos",
    }  # fmt: skip
    projections: Mapping[object, Literal["linear", "mlp"] | None] = {
        None: None, "linear": "linear", "mlp": "mlp",
    }  # fmt: skip
    hugging_face = text.values["hf_model_name"]
    pooler = text.values["hf_pooler_type"]
    return TextConfig(
        context=text.integer("context_length", 1, 1 << 16),
        rows=rows,
        blocks=_read_blocks(
            text, text.integer("heads", 1, 1 << 12), tensors, quick_gelu=quick_gelu
        ),
        causal=not text.flag("no_causal_mask"),
        class_token=text.flag("embed_cls"),
        pad_id=text.integer("pad_id", 0, rows - 1),
        eos_id=text.integer("eos_id", 0, rows - 1),
        pool=text.choice("pool_type", pools),
        projected=text.choice("proj_type", {"linear": True, "none": False}),
        projection_bias=text.flag("proj_bias"),
        tokenizer=tokenizer,
        cleaning=clean.choice("clean", cleanings),
        strip_separator=arguments.flag("strip_sep_token"),
        hf_model=None if hugging_face is None else text.text("hf_model_name"),
        hf_projection=text.choice("hf_proj_type", projections),
        hf_pooler=None if pooler is None else text.text("hf_pooler_type"),
    )
