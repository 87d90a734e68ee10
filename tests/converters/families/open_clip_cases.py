"""Tiny checkpoints in open_clip's format, made alike for the reference and for mmedge.

Weights are drawn by the names and shapes that open_clip itself gave, so that the recorded file
holds no weights. `python tests/converters/families/open_clip_cases.py [CASE ...]` writes that
file again, where open_clip, timm and ftfy are installed.
"""

# ruff: noqa: RUF001 -- texts that are cleaned

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

RECORDED = Path(__file__).with_name("open_clip_reference.json")
SIDE, DIM = 32, 16
MERGES = [
    ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"),
    ("l", "e</w>"), ("cir", "c"), ("circ", "le</w>"), ("a", "n"), ("o", "f</w>"), ("p", "h"),
    ("o", "t"), ("'", "s</w>"),
]  # fmt: skip
ROWS = 512 + len(MERGES) + 2
TEXTS = (
    "a red circle",
    "The photo OF the circle's  edge!",
    "&amp;lt; ﬁne ＷＩＤＥ “quoted” Größe 東京 🗼",
    "it'ſ 12 ΟΔΟΣ's WE'LL x_y",
    "the " * 60,
)

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "the", "&", "12", "x",
              "_", "y", "photo", "of", "##s", "edge", "größe", "wide", "quoted")  # fmt: skip

# Of the text towers of transformers.
_BERT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 20,
}  # fmt: skip
HF: Mapping[str, Mapping[str, Any]] = {
    "roberta": {**_BERT, "model_type": "roberta", "pad_token_id": 0, "type_vocab_size": 1},
    "bert": {**_BERT, "model_type": "bert", "pad_token_id": 0},
    "mt5": {
        "model_type": "mt5", "vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 8, "d_ff": 64,
        "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip

_CLIP_TEXT = {"context_length": 20, "vocab_size": ROWS, "width": 32, "heads": 4, "layers": 2}
_VIT = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
_SIGLIP_TEXT = {
    **_CLIP_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip

# timm's own arguments of the towers that open_clip names, at a tiny size.
TIMM: Mapping[str, Mapping[str, Any]] = {
    "tiny_eva02": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "qkv_fused": False, "mlp_ratio": 4 * 2 / 3, "swiglu_mlp": True, "scale_mlp": True,
        "scale_attn_inner": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16),
        "global_pool": "token",
    },
    "tiny_eva_giant": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
    },
    "tiny_eva_enormous": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "use_post_norm": True, "global_pool": "token",
    },
    "tiny_pe": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True, "ref_feat_shape": (6, 6), "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy", "attn_pool_num_heads": 8, "attn_pool_mlp_ratio": 4.0,
        "norm_eps": 1e-5,
    },
    "tiny_siglip": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "class_token": False, "global_pool": "map", "act_layer": "gelu_tanh",
    },
    "tiny_convnext": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "tiny_mci": {
        "layers": (1, 2, 1, 1), "embed_dims": (8, 16, 32, 64), "mlp_ratios": (3, 3, 3, 3),
        "se_downsamples": (False, False, True, True), "lkc_use_act": True,
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
    },
    "tiny_mci_large": {
        "layers": (1, 1, 1, 1, 1), "embed_dims": (4, 8, 16, 32, 64),
        "mlp_ratios": (4, 4, 4, 4, 4), "se_downsamples": (False,) * 5, "lkc_use_act": True,
        "downsamples": (False, True, True, True, True), "stem_use_scale_branch": False,
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention", "attention"),
    },
    "tiny_mobile_vit": {
        "img_size": SIDE, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "no_embed_class": True,
    },
    "tiny_clip": {
        "img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "pre_norm": True, "norm_eps": 1e-5,
    },
}  # fmt: skip


def _timm(name: str, pool: str = "token", **changes: object) -> dict[str, object]:
    return {
        "image_size": SIDE, "timm_model_name": name, "timm_model_pretrained": False,
        "timm_pool": pool, "timm_proj": None, **changes,
    }  # fmt: skip


def _case(
    vision: Mapping[str, object],
    text: Mapping[str, object] = _CLIP_TEXT,
    preprocess: Mapping[str, object] | None = None,
    **model: object,
) -> dict[str, Any]:
    return {
        "model_cfg": {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text, **model},
        "preprocess_cfg": preprocess or {},
    }


CASES: Mapping[str, dict[str, Any]] = {
    "vit": _case({**_VIT, "ls_init_value": 0.1}, quick_gelu=True),
    "eva02": _case(_timm("tiny_eva02"), custom_text=True),
    "coca": _case(
        {**_VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        {**_CLIP_TEXT, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**_CLIP_TEXT, "attn_pooler_heads": 4},
        custom_text=True,
    ),
    # Not exported by the default suite.
    "custom": _case(
        {**_VIT, "qk_norm": True, "scale_heads": True, "scale_attn_inner": True,
         "scale_attn": True, "scale_fc": True, "no_ln_pre": True, "pool_type": "avg",
         "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"},
        {**_CLIP_TEXT, "pool_type": "eos", "eos_id": ROWS - 1, "block_type": "custom"},
        {"resize_mode": "longest", "fill_color": 90, "mean": [0.5, 0.5, 0.5]},
    ),
    "rectangle": _case(
        {**_VIT, "image_size": [32, 48], "pool_type": "avg"},
        {**_CLIP_TEXT, "pool_type": "first", "proj_type": "none", "width": DIM},
        {"interpolation": "bilinear"},
    ),
    "siglip": _case(
        _timm("tiny_siglip", "map", timm_proj="none"),
        {**_SIGLIP_TEXT, "width": 32, "tokenizer_kwargs": {"clean": "canonicalize"}},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
        custom_text=True, init_logit_bias=-10, embed_dim=32,
    ),
    "mobile": _case(
        _timm("tiny_clip", timm_proj="linear", timm_drop=0.0, timm_drop_path=0.1),
        {**_CLIP_TEXT, "no_causal_mask": True}, custom_text=True,
    ),
    "clipa": _case(
        {**_VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {**_CLIP_TEXT, "vocab_size": len(VOCABULARY), "hf_tokenizer_name": "bert-tiny",
         "tokenizer_kwargs": {"strip_sep_token": True}, "pool_type": "last",
         "no_causal_mask": True, "context_length": 12},
    ),
    "worldwide": _case(
        _VIT,
        {**_CLIP_TEXT, "vocab_size": len(VOCABULARY), "hf_tokenizer_name": "bert-tiny",
         "pool_type": "eos", "eos_id": 3, "tokenizer_kwargs": {"clean": "lower"}},
    ),
    **{
        name: _case(
            {**_VIT, "pool_type": "avg"},
            {"hf_model_name": name, "hf_tokenizer_name": name, "context_length": 12, **settings},
        )
        for name, settings in (
            ("roberta", {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}),
            ("bert", {"hf_pooler_type": "cls_pooler"}),
            ("mt5", {"hf_pooler_type": None}),
        )
    },
    "convnext": _case(_timm("tiny_convnext", "", timm_proj="mlp", image_size=64)),
    "convnext-head": _case(_timm("tiny_convnext", "avg", image_size=64), custom_text=True),
    **{
        name: _case(
            _timm(tower, "avg", image_size=64, timm_drop=0.0, timm_drop_path=0.0),
            {**_CLIP_TEXT, "no_causal_mask": True},
            {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
            custom_text=True,
        )
        for name, tower in (("mobileclip", "tiny_mci"), ("mobileclip2", "tiny_mci_large"))
    },
    "mobileclip-b": _case(_timm("tiny_mobile_vit"), custom_text=True),
    "giant": _case(_timm("tiny_eva_giant"), custom_text=True),
    "giant-projected": _case(_timm("tiny_eva_giant", "", timm_proj="mlp"), custom_text=True),
    "enormous": _case(_timm("tiny_eva_enormous", "avg"), custom_text=True),
    "pe": _case(_timm("tiny_pe", "map"), custom_text=True),
    "coca-average": _case(
        {**_VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True,
         "width": DIM, "pool_type": "avg", "attn_pooler_queries": 5},
        {**_CLIP_TEXT, "embed_cls": True, "output_tokens": True, "no_causal_mask": True},
        multimodal_cfg={**_CLIP_TEXT, "attn_pooler_heads": 4},
        custom_text=True,
    ),
}  # fmt: skip


def tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draw each tensor by its name; norms are about 1, a logit scale about 2."""
    drawn = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = np.asarray(rng.normal(size=shape), np.float32) * 0.3
        one = name.endswith((".weight", "gamma", "head_scale")) and len(shape) in (1, 3)
        offset = 2 if name == "logit_scale" else 1 if one else 0
        drawn[name] = np.asarray(values + offset, np.float32)
        if name.endswith(".running_var"):
            drawn[name] = np.abs(values) + np.float32(0.5)
        if name.endswith(".num_batches_tracked"):
            drawn[name] = np.array(1, np.int64)
    return drawn


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Path:
    """Write a checkpoint with drawn weights and the vocabulary of MERGES."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    hugging_face = config["model_cfg"]["text_cfg"].get("hf_model_name")
    if hugging_face:
        (folder / "config.json").write_text(json.dumps(HF[hugging_face]))
    save_file(tensors(shapes), folder / "open_clip_model.safetensors")
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        _write_word_pieces(folder)
        return folder
    lines = "".join(f"{left} {right}\n" for left, right in MERGES)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return folder


def _write_word_pieces(folder: Path) -> None:
    """Write a tokenizer as BERT has it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(dict.fromkeys(VOCABULARY))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
    ).save_pretrained(folder)


def images() -> list[Image.Image]:
    """Return images of several sizes, whole numbers alone."""
    made = []
    for height, width in ((40, 61), (57, 32), (33, 90)):
        y, x = np.mgrid[0:height, 0:width]
        channels = [(x * 7 + y * 3) % 256, (x * y) % 256, (x // 5 + y // 7) % 2 * 200]
        made.append(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)))
    return made


def reference(folder: Path, name: str) -> dict[str, Any]:
    """Return what open_clip gives for a case: names and shapes, ids, embeddings, scale and bias."""
    import torch

    _prepare_reference()
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = json.loads(json.dumps(CASES[name]))
    if hugging_face := config["model_cfg"]["text_cfg"].get("hf_model_name"):
        config["model_cfg"]["text_cfg"]["hf_model_name"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if hugging_face:
        (folder / "config.json").write_text(json.dumps(HF[hugging_face]))
    place = f"local-dir:{folder}"
    empty = open_clip.create_model(place, load_weights=False, pretrained_text=False)
    shapes = {key: list(tensor.shape) for key, tensor in empty.state_dict().items()}
    write_checkpoint(folder, CASES[name], shapes)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with gzip.open(folder / "tiny.gz", "wt", encoding="utf-8") as file:
        file.write("".join(["#\n", *(f"{left} {right}\n" for left, right in MERGES)]).rstrip())
    model = open_clip.create_model(place).eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    own = not config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    given = {"bpe_path": str(folder / "tiny.gz")} if own else {}
    tokenizer = open_clip.get_tokenizer(place, **given)
    ids = tokenizer(list(TEXTS))
    with torch.inference_mode():
        image = model.encode_image(torch.stack([transform(each) for each in images()]), True)
        text = model.encode_text(ids, True)
        bias = model.logit_bias
    return {
        "shapes": shapes,
        "ids": ids.tolist(),
        "image": image.double().numpy().round(7).tolist(),
        "text": text.double().numpy().round(7).tolist(),
        "scale": round(float(model.logit_scale.exp()), 5),
        "bias": None if bias is None else round(float(bias), 6),
    }


def built_in() -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]]:
    """Yield open_clip's own architectures: name, configuration, and shapes of the tensors."""
    import torch

    _prepare_reference()
    import open_clip

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "hf_model_name" in config["text_cfg"]:
            continue  # its tower would be fetched
        with torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, device="meta")
        yield name, config, {key: tuple(it.shape) for key, it in model.state_dict().items()}


def _prepare_reference() -> None:
    """Let torchvision be imported beside another build of torch, and make the tiny towers known."""
    import sys
    from functools import partial

    import torch

    if "open_clip" in sys.modules:
        return
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    import timm  # type: ignore[import-not-found]
    from timm.models.convnext import ConvNeXt  # type: ignore[import-not-found]
    from timm.models.eva import Eva  # type: ignore[import-not-found]
    from timm.models.fastvit import (  # type: ignore[import-not-found]
        FastVit,
        LayerNorm2d,
        RepConditionalPosEnc,
    )
    from timm.models.vision_transformer import (  # type: ignore[import-not-found]
        VisionTransformer,
    )
    from timm.models.vision_transformer_hybrid import (  # type: ignore[import-not-found]
        ConvStem,
        HybridEmbed,
    )

    def fast(**given: Any) -> Any:
        attends = [mixer == "attention" for mixer in given["token_mixers"]]
        position = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
        if len(attends) == 5:
            given["norm_layer"] = partial(LayerNorm2d, eps=1e-5)
        given = {key: value for key, value in given.items() if key != "img_size"}
        return FastVit(pos_embs=tuple(position if each else None for each in attends), **given)

    def mobile(**given: Any) -> Any:
        stem = ConvStem(
            channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0,
            act_layer=torch.nn.GELU,
        )  # fmt: skip
        return VisionTransformer(
            embed_layer=partial(HybridEmbed, backbone=stem, proj=False), **given
        )

    kinds = {
        "siglip": VisionTransformer, "clip": VisionTransformer, "convnext": ConvNeXt, "mci": fast,
        "mobile": mobile,
    }  # fmt: skip
    for name, given in TIMM.items():
        made = kinds.get(name.split("_")[1], Eva)

        def build(
            kind: Any = made,
            settings: Mapping[str, Any] = given,
            pretrained: bool = False,
            **changes: Any,
        ) -> Any:
            changes = {key: value for key, value in changes.items() if not key.startswith("pretra")}
            arguments = {**settings, **changes}
            for key in ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"):
                arguments.pop(key, None)
            if (eps := arguments.pop("norm_eps", None)) is not None:
                arguments["norm_layer"] = partial(torch.nn.LayerNorm, eps=eps)
            model = kind(**arguments)
            model.default_cfg = {}
            return model

        build.__name__ = name
        build.__module__ = "timm.models.eva"
        timm.models.register_model(build)


def main() -> None:
    """Record what open_clip gives, for the cases that are named, or for all."""
    import sys
    import tempfile

    made = json.loads(RECORDED.read_text("utf-8")) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder:
        made |= {name: reference(Path(folder) / name, name) for name in sys.argv[1:] or CASES}
    lines = [f'"{name}": {json.dumps(case, separators=(",", ":"))}' for name, case in made.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
