"""Checkpoints of open_clip: CLIP, EVA-CLIP, CoCa's contrastive towers and their like.

`open_clip_config.json` names towers of open_clip, timm and transformers. Those of open_clip and
timm are modules of mmedge here, which give what the originals give, so that neither is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.base import ModelSpec, RoleSpec, TapPoint
from mmedge.converters.families.loading import check_tensors, read_tensors
from mmedge.converters.families.open_clip_config import (
    ModelConfig,
    Sides,
    TextConfig,
    TimmVisionConfig,
    read_model_config,
)
from mmedge.converters.families.open_clip_convnext import CONVNEXT, ConvNextVisionTower
from mmedge.converters.families.open_clip_fastvit import FASTVIT, FastVitVisionTower
from mmedge.converters.families.open_clip_hf import HuggingFaceTextTower, read_text_architecture
from mmedge.converters.families.open_clip_modules import (
    NativeTextTower,
    NativeVisionTower,
    unpack,
)
from mmedge.converters.families.open_clip_timm import TIMM, TimmVisionTower
from mmedge.converters.families.taps import block_tap, ends_at, unpadded
from mmedge.converters.families.towers import (
    IMAGE_BATCH,
    TEXT_BATCH,
    Tower,
    dual_encoder,
    embedding_role,
    seeded,
)
from mmedge.converters.sources.clip_bpe import clip_bpe_json
from mmedge.converters.sources.config import Fields
from mmedge.converters.sources.source import OPEN_CLIP, Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    tokenizer_fields,
)
from mmedge.errors import SourceError
from mmedge.preprocess import config as frozen
from mmedge.preprocess.steps import Crop, Decode, ImageStep, Normalize, Resample, Rescale, Resize
from mmedge.specs import Axis, Modality, TensorSpec

__all__ = ["FAMILY"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PREPROCESSING: Mapping[str, object] = {
    "size": None, "mode": "RGB", "mean": _MEAN, "std": _STD, "interpolation": "bicubic",
    "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip
_TEXT_KEYS = ("positional_embedding", "token_embedding", "transformer", "ln_final",
              "text_projection", "cls_emb")  # fmt: skip
_INNER = "text.transformer."
_USUAL_TOKENS = 16
_BLOCKS = "tower.transformer.resblocks"  # of open_clip's own towers


class _DualEncoder(nn.Module):
    """Both towers, and the scale and bias of scores, by open_clip's names."""

    def __init__(
        self,
        config: ModelConfig,
        visual: nn.Module,
        text: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.config, self.visual, self.text = config, visual, text
        scalars = [
            (1,) if shapes.get(name) == (1,) else () for name in ("logit_scale", "logit_bias")
        ]
        self.logit_scale = nn.Parameter(torch.empty(scalars[0]))
        self.logit_bias = nn.Parameter(torch.empty(scalars[1])) if config.biased else None


class _Encoder(nn.Module):
    """A tower with its output L2-normalised."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.tower(item), dim=-1)


class OpenClip:
    """Dual encoders in open_clip's format."""

    name = "open_clip"

    def matches(self, source: Source) -> bool:
        """Return whether a source is in open_clip's format."""
        return source.model_type == OPEN_CLIP

    def load(self, source: Source) -> nn.Module:
        """Load both towers in fp32 from the checkpoint's tensors, none missing and none left."""
        config = read_model_config(source.fields, len(source.shapes))
        if config.text.hf_model is not None:
            architecture = read_text_architecture(source, config.text)
            config = replace(config, text_architecture=architecture)
        _read_preprocessing(source, config.vision.image_size)
        _read_tokenizer(source, config)
        model = _outline(source, config)
        weights = _read_weights(source, config)
        check_tensors(source, model, weights)
        if isinstance(model.text, HuggingFaceTextTower):
            inner = [name for name in weights if name.startswith(_INNER)]
            model.text.load_transformer(
                {name.removeprefix(_INNER): weights.pop(name) for name in inner}
            )
            model.load_state_dict(weights, assign=True, strict=False)
        else:
            model.load_state_dict(weights, assign=True)
        unpack(model)
        return model.eval().requires_grad_(requires_grad=False)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe both encoders, normalisation inside, and their scores."""
        loaded = cast(Any, model)
        config: ModelConfig = loaded.config
        image, (text, files) = (
            _read_preprocessing(source, config.vision.image_size),
            _read_tokenizer(source, config),
        )
        towers = {
            Modality.IMAGE: Tower(
                role=lambda: _image_role(_Encoder(loaded.visual), config),
                processor=image,
                reference=None,
            ),
            Modality.TEXT: Tower(
                role=lambda: _text_role(_Encoder(loaded.text), config, text),
                processor=text,
                reference=None,
                files=files,
            ),
        }
        biased = loaded.logit_bias is not None
        head = ContrastiveHead(
            activation="sigmoid" if biased else "softmax",
            logit_scale=float(loaded.logit_scale.exp()),
            **({"logit_bias": float(loaded.logit_bias)} if biased else {}),
        )
        # transformers does not open its processors.
        return replace(dual_encoder(towers, config.dim, head), reference_processors=False)


def _outline(source: Source, config: ModelConfig) -> _DualEncoder:
    """Return the model on the meta device: names and shapes alone."""
    with torch.device("meta"):
        visual = _vision_tower(source, config)
        text: nn.Module
        if config.text_architecture is None:
            text = NativeTextTower(config.text, config.dim)
        else:
            text = HuggingFaceTextTower(config.text, config.text_architecture, config.dim)
        return _DualEncoder(config, visual, text, source.shapes)


def _vision_tower(source: Source, config: ModelConfig) -> nn.Module:
    vision, file = config.vision, source.fields.file
    if not isinstance(vision, TimmVisionConfig):
        return NativeVisionTower(vision, config.dim)
    name = vision.name.split(".", maxsplit=1)[0]  # a tag of pretrained weights may follow
    pools = {"avg"}
    if (shape := TIMM.get(name)) is not None:
        pools |= {"", shape.pool, *(["token"] if shape.class_token else [])}
        tower: nn.Module = TimmVisionTower(vision, shape, config.dim)
    elif (stages := CONVNEXT.get(name)) is not None:
        pools |= set() if vision.projection is None else {""}
        tower = ConvNextVisionTower(vision, stages, config.dim)
    elif (fast := FASTVIT.get(name)) is not None:
        joined = any(".reparam_conv." in each for each in source.shapes)
        tower = FastVitVisionTower(vision, fast, config.dim, joined=joined)
    else:
        raise SourceError(
            f"{file}, timm_model_name: mmedge has no '{vision.name}' of timm. It has "
            f"{', '.join({**TIMM, **CONVNEXT, **FASTVIT})}."
        )
    if vision.pool not in pools:
        raise SourceError(
            f"{file}, timm_pool: '{vision.name}' has no pooling '{vision.pool}', expected one of "
            f"{', '.join(map(repr, sorted(pools)))}. Correct the file."
        )
    return tower


def _read_preprocessing(source: Source, sides: Sides) -> frozen.ImageConfig:
    """Freeze open_clip's transform of images for inference.

    Raises:
        SourceError: If `preprocess_cfg` asks for what open_clip does not have.
    """
    given = source.fields.section("preprocess_cfg") or Fields(source.fields.file, {})
    for key in given.values.keys() - _PREPROCESSING.keys():
        raise given.error(key, f"a key of {', '.join(_PREPROCESSING)}", "Remove it.")
    written = {key: value for key, value in given.values.items() if value is not None}
    settings = Fields(given.file, {**_PREPROCESSING, **written}, given.path)
    settings.choice("mode", {"RGB": 0})
    if settings.values["size"] is not None:
        size = settings.integers("size", 1, 1 << 13)
        if len(size) > 2 or (size[0], size[-1]) != sides:
            raise settings.error("size", f"the image_size of the model, {sides}")
    resamples: Mapping[object, Resample] = {
        "bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic",
    }  # fmt: skip
    resample = settings.choice("interpolation", resamples)
    mode = settings.choice(
        "resize_mode", {name: name for name in ("shortest", "longest", "squash")}
    )
    height, width = sides
    resize: tuple[ImageStep, ...]
    if mode == "squash":
        resize = (Resize(mode="exact", height=height, width=width, resample=resample),)
    elif mode == "longest":
        fill = settings.integer("fill_color", 0, 255)
        resize = (
            Resize(mode="fit", height=height, width=width, resample=resample),
            Crop(height=height, width=width, rounding="nearest", fill=fill),
        )
    elif height == width:
        resize = (
            Resize(mode="shortest_edge", height=height, width=width, resample=resample),
            Crop(height=height, width=width, rounding="nearest"),
        )
    else:  # open_clip passes no interpolation on in this case
        resize = (
            Resize(mode="cover", height=height, width=width, resample="bicubic"),
            Crop(height=height, width=width, rounding="nearest"),
        )
    mean = settings.triple("mean", -1e3, 1e3)
    std = settings.triple("std", 1e-6, 1e3)
    return frozen.ImageConfig(
        steps=(
            Decode(alpha="drop"),
            *resize,
            Rescale(factor=1 / 255),
            Normalize(mean=mean, std=std),
        )
    )


def _read_tokenizer(
    source: Source, model: ModelConfig
) -> tuple[frozen.TextConfig, dict[str, bytes]]:
    """Freeze a checkpoint's tokenizer, and return it with its file.

    Raises:
        SourceError: If its files are missing or do not fit the model.
    """
    text, architecture = model.text, cast(Any, model.text_architecture)
    if text.tokenizer is None:
        content, closing = clip_bpe_json(source.folder, text.rows)
        pad_id = 0
        if text.pool == "eos" and text.eos_id != closing:
            raise SourceError(
                f"{source.fields.file}: text_cfg.eos_id is {text.eos_id}, but a text is closed by "
                f"{closing}. Correct the file."
            )
    else:
        tokenizer = load_tokenizer(source)
        rows = text.rows if architecture is None else int(architecture.vocab_size)
        check_tokenizer(source, tokenizer, rows)
        if tokenizer.padding_side != "right":
            raise SourceError(
                f"{source.name}: its tokenizer pads on the {tokenizer.padding_side}, which mmedge "
                "cannot. Set padding_side to right in tokenizer_config.json, if the model was "
                "trained so."
            )
        fields = tokenizer_fields(source, tokenizer)
        masked = None if architecture is None else int(architecture.pad_token_id)
        pad_id = fields.integer("pad_token_id", masked or 0, rows - 1 if masked is None else masked)
        content = backend_json(source, tokenizer)
        if text.strip_separator:
            content = _with_zero(content, int(tokenizer.sep_token_id))
    config = frozen.TextConfig(
        max_length=text.context,
        padding="longest" if _reads_true_length(text) else "max_length",
        pad_id=pad_id,
        cleaning=text.cleaning,
    )
    return config, {config.tokenizer_file: content.encode()}


def _with_zero(content: str, token: int) -> str:
    """Return a `tokenizer.json` that adds 0 to a text where it added another special token."""
    document = json.loads(content)
    steps = document["post_processor"]
    for step in steps["processors"] if steps["type"] == "Sequence" else [steps]:
        for special in step.get("special_tokens", {}).values():  # TemplateProcessing
            special["ids"] = [0 if each == token else each for each in special["ids"]]
        if "sep" in step and step["sep"][1] == token:  # BertProcessing, RobertaProcessing
            step["sep"][1] = 0
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _reads_true_length(text: TextConfig) -> bool:
    """Tell whether padding behind a text cannot change its embedding.

    A causal tower that pools at the end of a text does not see what follows. open_clip's tokenizer
    pads with 0, and the closing token has the highest id. Towers of transformers mask the padding.
    """
    if text.hf_model is not None:
        return True
    pooled_at_end = text.pool == "eos" or (text.pool == "argmax" and text.tokenizer is None)
    return text.causal and pooled_at_end and not text.class_token


def _read_weights(source: Source, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors by the names of _DualEncoder, in fp32."""
    weights = read_tensors(source)
    flat = "positional_embedding" in weights  # class CLIP has the text tower's tensors at the top
    named: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if config.decoder and name.startswith("text_decoder."):
            continue
        moved = flat and name.split(".", maxsplit=1)[0] in _TEXT_KEYS
        named[f"text.{name}" if moved else name] = tensor.float()
    return named


def _image_role(module: nn.Module, config: ModelConfig) -> RoleSpec:
    height, width = config.vision.image_size

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        with seeded(seed):  # about the range that normalised pixels have
            return {"pixel_values": torch.rand(sizes["batch"], 3, height, width) * 4 - 2}

    return embedding_role(
        module,
        (TensorSpec("pixel_values", np.dtype(np.float32), ("batch", 3, height, width)),),
        config.dim,
        processor="image",
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        taps=_patches(module, config),
    )


def _patches(module: nn.Module, config: ModelConfig) -> dict[str, TapPoint]:
    """Return the tap of a vision transformer; none of other towers."""
    tower, (height, width) = module.tower, config.vision.image_size
    if isinstance(tower, NativeVisionTower):
        rows, columns = tower.config.patch_size
        shape = ((height // rows) * (width // columns), tower.config.blocks.width)
        return block_tap(module, _BLOCKS, shape, skip=1)
    if isinstance(tower, TimmVisionTower):
        trunk = tower.trunk
        shape = (trunk.grid[0] * trunk.grid[1], trunk.shape.width)
        return block_tap(module, "tower.trunk.blocks", shape, skip=int(trunk.shape.class_token))
    return {}


def _tokens(
    module: nn.Module, config: ModelConfig, tokens: int | str, end: int
) -> dict[str, TapPoint]:
    """Return the tap of a text tower; none where a class token stands among its tokens."""
    tower = module.tower
    if isinstance(tower, NativeTextTower) and not config.text.class_token:
        return block_tap(module, _BLOCKS, (tokens, config.text.blocks.width), mask=ends_at(end))
    if isinstance(tower, HuggingFaceTextTower):
        architecture = cast(Any, config.text_architecture)
        shape = (tokens, int(architecture.hidden_size))
        mask = unpadded(int(architecture.pad_token_id))
        return block_tap(module, "tower.transformer.encoder.layer", shape, mask=mask)
    return {}


def _text_role(module: nn.Module, config: ModelConfig, processor: frozen.TextConfig) -> RoleSpec:
    text, longest = config.text, processor.max_length
    rows = int(getattr(config.text_architecture, "vocab_size", text.rows))
    dynamic = processor.padding == "longest"
    end = text.eos_id if text.pool == "eos" else rows - 1

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        shape = sizes["batch"], sizes.get("sequence", longest)
        with seeded(seed):
            ids = torch.randint(0, rows, shape)
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1))
        ids[ids == end] = 0 if end else 1
        places = torch.arange(shape[1])
        ids[places >= lengths] = processor.pad_id
        ids[places == lengths - 1] = end
        return {"input_ids": ids}

    axes = {"batch": TEXT_BATCH}
    sequences: list[dict[str, int]] = [{}]
    traced: dict[str, int] = {}
    if dynamic:
        axes["sequence"] = Axis(1, min(_USUAL_TOKENS, longest), longest)
        sequences = [{"sequence": n} for n in sorted({2, (longest + 1) // 2, longest})]
        traced = {"sequence": max(2, longest // 2)}
    return embedding_role(
        module,
        (
            TensorSpec(
                "input_ids", np.dtype(np.int64), ("batch", "sequence" if dynamic else longest)
            ),
        ),
        config.dim,
        processor="text",
        axes=axes,
        sample=sample,
        traced=traced,
        proved=sequences,
        taps=_tokens(module, config, "sequence" if dynamic else longest, end),
    )


FAMILY = OpenClip()
