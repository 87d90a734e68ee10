"""open_clip's checkpoints against what open_clip itself gave for them."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import regex
import torch
from describing import Described, describe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip_cases import (
    CASES,
    HF,
    MERGES,
    RECORDED,
    ROWS,
    TEXTS,
    TIMM,
    built_in,
    images,
    reference,
    write_checkpoint,
)
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, pre_tokenizers

import mmedge
from mmedge.bundle import open_bundle
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.families import open_clip_config, open_clip_timm
from mmedge.converters.families.open_clip import _PREPROCESSING, _outline, _read_preprocessing
from mmedge.converters.families.open_clip_config import read_model_config
from mmedge.converters.families.open_clip_convnext import CONVNEXT, ConvNextArchitecture
from mmedge.converters.families.open_clip_fastvit import FASTVIT, FastVitArchitecture
from mmedge.converters.families.open_clip_timm import TimmArchitecture
from mmedge.converters.sources.clip_bpe import clip_bpe_json
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.preprocess.cleaning import clean
from mmedge.specs import Array

TEXT_KEYS = (
    "positional_embedding", "token_embedding", "transformer", "ln_final", "text_projection"
)  # fmt: skip
RECORD: Mapping[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
TINY = {
    "tiny_eva02": TimmArchitecture(
        8, 32, 2, 4, 85, qkv="separate", norm_inner=True, gated=True, rotary=16
    ),
    "tiny_eva_giant": TimmArchitecture(8, 32, 2, 4, 128, pool="avg", qkv="unbiased_key"),
    "tiny_eva_enormous": TimmArchitecture(8, 32, 2, 4, 128, qkv="unbiased_key", norm_behind=True),
    "tiny_pe": TimmArchitecture(
        8, 32, 2, 4, 128, pool="map", eps=1e-5, norm_before=True,
        rotary=6, rotary_offset=1.0, rotary_xy=True, pool_heads=8,
    ),
    "tiny_siglip": TimmArchitecture(
        8, 32, 2, 4, 128, pool="map", class_token=False, pool_heads=4, activation="gelu_tanh"
    ),
    "tiny_clip": TimmArchitecture(8, 32, 2, 4, 128, eps=1e-5, norm_before=True),
    "tiny_mobile_vit": TimmArchitecture(16, 32, 2, 4, 128, stem=True, class_position=False),
}  # fmt: skip
TINY_FAST = {
    "tiny_mci": FastVitArchitecture((1, 2, 1, 1), (8, 16, 32, 64)),
    "tiny_mci_large": FastVitArchitecture(
        (1,) * 5, (4, 8, 16, 32, 64), 4, 2, 0, layer_norm=True, stem_scale=False
    ),
}


@pytest.fixture(autouse=True)
def _tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*TINY, *TINY_FAST, "tiny_convnext"} == TIMM.keys()
    for name, shape in TINY_FAST.items():
        monkeypatch.setitem(FASTVIT, name, shape)
    for name, shape in TINY.items():
        monkeypatch.setitem(open_clip_timm.TIMM, name, shape)
    stages = ConvNextArchitecture((1, 1, 2, 1), (8, 16, 24, 32))
    monkeypatch.setitem(CONVNEXT, "tiny_convnext", stages)


def write(folder: Path, name: str, **changes: Any) -> Path:
    """Write a case; changes of its `model_cfg`, merged two levels deep."""
    config = json.loads(json.dumps(CASES[name]))
    for key, value in changes.items():
        part = config["model_cfg"]
        part[key] = {**part[key], **value} if isinstance(value, dict) else value
    return write_checkpoint(folder / name, config, RECORD[name]["shapes"])


def embeddings(described: Described, out: Path) -> dict[str, Array]:
    """Embeddings of the images and the texts, by role."""
    processors = described.freeze(out)
    found = {}
    for name, items in (("image", images()), ("text", list(TEXTS))):
        spec = described.spec.roles[f"{name}_encoder"]()
        assert spec.module is not None
        fed = processors[name](items)
        with torch.inference_mode():
            found[name] = spec.module(*(torch.from_numpy(fed[i.name]) for i in spec.inputs)).numpy()
    return found


@pytest.mark.parametrize("name", RECORD)
def test_embeddings_ids_and_scores_are_open_clips(name: str, tmp_path: Path) -> None:
    recorded = RECORD[name]
    described = describe(write(tmp_path, name))
    assert described.family == "open_clip"
    for item, got in embeddings(described, tmp_path / "bundle").items():
        np.testing.assert_allclose(got, np.array(recorded[item]), atol=2e-6)
    kind = described.spec.kind
    assert isinstance(kind, DualEncoderKind)
    head = kind.contrastive_head
    assert head is not None
    assert head.logit_scale == pytest.approx(recorded["scale"], abs=1e-4)
    assert head.activation == ("softmax" if recorded["bias"] is None else "sigmoid")
    assert head.logit_bias == pytest.approx(recorded["bias"] or 0.0, abs=1e-5)
    processor = described.freeze(tmp_path / "again")["text"]
    for text, expected in zip(TEXTS, recorded["ids"], strict=True):
        ids = processor([text])["input_ids"][0].tolist()
        assert ids == expected[: len(ids)]
        assert not any(expected[len(ids) :])  # padding


needs_open_clip = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("open_clip", "timm")), reason="no open_clip"
)


@pytest.mark.slow
@needs_open_clip
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_record_is_what_open_clip_gives(name: str, tmp_path: Path) -> None:
    fresh = reference(tmp_path, name)
    for item in ("image", "text"):
        np.testing.assert_allclose(fresh.pop(item), np.array(RECORD[name][item]), atol=2e-6)
    assert fresh == {key: RECORD[name][key] for key in fresh}


@pytest.mark.slow
@needs_open_clip
@pytest.mark.filterwarnings("ignore")
def test_open_clips_own_architectures_have_these_tensors(tmp_path: Path) -> None:
    made, refused = 0, []
    for name, config, expected in built_in():
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        source = Source(
            tmp_path, name, None, {"model_cfg": config}, (), expected,
            config_file="open_clip_config.json",
        )  # fmt: skip
        try:
            model = _outline(source, read_model_config(source.fields, len(expected)))
        except SourceError as error:
            refused.append((name, str(error)))
            continue
        made += 1
        known = {
            f"text.{key}" if key.startswith(TEXT_KEYS) else key: shape
            for key, shape in expected.items()
            if not key.startswith("text_decoder.") and not key.endswith("num_batches_tracked")
        }
        assert {key: tuple(it.shape) for key, it in model.state_dict().items()} == known, name
    assert made >= 97
    assert all("ResNet" in why or "of timm" in why or "hf_model" in why for _, why in refused)


@pytest.fixture(scope="module", params=["vit", "eva02", "coca", "roberta"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A case and its bundle in fp32; not to be changed."""
    folder = tmp_path_factory.mktemp("open-clip")
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in TINY.items():
            patch.setitem(open_clip_timm.TIMM, name, shape)
        patch.setitem(FASTVIT, "tiny_mci", TINY_FAST["tiny_mci"])
        out = folder / "x.mmedge"
        convert(ConvertConfig(str(write(folder, request.param)), out, precisions=("fp32",)))
    return request.param, out


def test_a_bundle_embeds_as_open_clip_does(converted: tuple[str, Path]) -> None:
    name, bundle = converted
    with mmedge.DualEncoder.load(bundle, backend="onnxruntime") as clip:
        got = {"image": clip.encode_image(images()), "text": clip.encode_text(TEXTS)}
    for item, vectors in got.items():
        np.testing.assert_allclose(vectors, np.array(RECORD[name][item]), atol=2e-5)


def test_the_passes_know_the_graphs(converted: tuple[str, Path]) -> None:
    name, bundle = converted
    for role, pooling in (("image_encoder", name == "coca"), ("text_encoder", False)):
        portable = operators(bundle / role / "fp32.onnx")
        fused = operators(bundle / role / "fp32.onnxruntime.onnx")
        assert fused["Attention"] == 2 + pooling
        assert not {"Conv"} & portable.keys()
    manifest = open_bundle(bundle).manifest
    (ids,) = manifest.roles["text_encoder"].inputs
    assert ids.shape == ("batch", 20 if name == "coca" else "sequence")


def operators(path: Path) -> Counter[str]:
    """Operators of a graph, counted."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"depth": 2}, "model_cfg.depth: got 2, expected a key that open_clip 3 knows"),
        ("vit", {"vision_cfg": {"stem": 1}}, "vision_cfg.stem: got 1, expected a key"),
        ("vit", {"text_cfg": {"rope": True}}, "text_cfg.rope: got True, expected a key"),
        ("vit", {"embed_dim": "16"}, "model_cfg.embed_dim: got '16', expected an integer"),
        ("vit", {"vision_cfg": {"layers": 10**9}}, "vision_cfg.layers: got 1000000000"),
        ("vit", {"vision_cfg": {"layers": [3, 4, 6, 3]}}, "mmedge has no ResNet"),
        ("vit", {"vision_cfg": {"patch_size": 64}}, "patch_size: got 64, expected no more"),
        ("vit", {"vision_cfg": {"pool_type": "none"}}, "pool_type: got 'none', expected one of"),
        ("vit", {"vision_cfg": {"attentional_pool": "cascade"}}, "attentional_pool: got 'cascade'"),
        ("vit", {"vision_cfg": {"scaled_cosine_attn": True}}, "scaled_cosine_attn: got True"),
        ("vit", {"vision_cfg": {"head_width": 6}}, "width: got 32, expected a multiple of its 5"),
        ("vit", {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "null, as the activation"),
        ("vit", {"text_cfg": {"norm_kwargs": {"bias": False}}}, "norm_kwargs.bias: got False"),
        ("vit", {"text_cfg": {"embed_cls": True}}, "custom_text: got False, expected true"),
        ("vit", {"text_cfg": {"tokenizer_mode": "clips"}}, "tokenizer_mode: got 'clips'"),
        ("vit", {"text_cfg": {"tokenizer_kwargs": {"reduction_mask": "simple"}}}, "reduction_mask"),
        ("vit", {"text_cfg": {"pool_type": "eos"}}, "eos_id is 2, but a text is closed by 527"),
        ("eva02", {"vision_cfg": {"timm_model_name": "resnet50"}}, "has no 'resnet50' of timm"),
        ("eva02", {"vision_cfg": {"timm_pool": "map"}}, "'tiny_eva02' has no pooling 'map'"),
        ("convnext", {"vision_cfg": {"timm_proj": None}}, "'tiny_convnext' has no pooling ''"),
        ("siglip", {"vision_cfg": {"timm_pool": "token"}}, "has no pooling 'token'"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, name, **changes)
    with pytest.raises(SourceError, match=re.escape(message)):
        describe(folder)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, None, "is 'roberta' of transformers, whose config.json is missing"),
        ({}, {"model_type": "m2m_100"}, "model_type: got 'm2m_100', expected one of bert"),
        ({}, {"hidden_size": 1 << 16}, "hidden_size: got 65536, expected no more than"),
        ({}, {"hidden_size": 16, "num_attention_heads": 4}, "word_embeddings.weight is (20, 32)"),
        ({"hf_pooler_type": "max_pooler"}, {}, "hf_pooler_type is 'max_pooler', expected one of"),
        ({"hf_tokenizer_name": None}, {}, "names no hf_tokenizer_name"),
        ({"hf_proj_type": None}, {}, "the tower's width 32 is not embed_dim 16"),
        ({"context_length": 77}, {}, "context_length is 77, but config.json has positions for 19"),
        ({}, {"pad_token_id": 1}, "pad_token_id: got 0, expected 1"),
    ],
)
def test_a_text_tower_of_transformers_that_does_not_fit_is_refused(
    changes: dict[str, Any], config: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "roberta", text_cfg=changes)
    if config is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(json.dumps({**HF["roberta"], **config}))
    with pytest.raises(SourceError, match=re.escape(message)):
        describe(folder)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "clipa")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="tokenizer cannot be loaded"):
        describe(folder)


def test_padding_on_the_left_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "clipa")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["padding_side"] = "left"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match="pads on the left"):
        describe(folder)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"crop": 1}, "preprocess_cfg.crop: got 1, expected a key of size"),
        ({"size": 64}, r"size: got 64, expected the image_size of the model, (32, 32)"),
        ({"interpolation": "area"}, "interpolation: got 'area', expected one of bicubic"),
        ({"resize_mode": "pad"}, "resize_mode: got 'pad'"),
        ({"mean": [0.5, 0.5]}, "mean: got [0.5, 0.5], expected three numbers"),
        ({"mode": "L"}, "mode: got 'L'"),
    ],
)
def test_preprocessing_of_another_kind_is_refused(
    preprocess: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {**CASES["vit"], "preprocess_cfg": preprocess}
    folder = write_checkpoint(tmp_path / "vit", config, RECORD["vit"]["shapes"])
    with pytest.raises(SourceError, match=re.escape(message)):
        describe(folder)


def test_every_mismatch_of_config_and_weights_is_named(tmp_path: Path) -> None:
    shapes = dict(RECORD["vit"]["shapes"])
    shapes["visual.conv2.weight"] = shapes.pop("visual.conv1.weight")
    shapes["token_embedding.weight"] = [7, 32]
    folder = write_checkpoint(tmp_path / "vit", CASES["vit"], shapes)
    with pytest.raises(SourceError) as raised:
        describe(folder)
    for part in (
        "do not fit open_clip_config.json",
        "visual.conv1.weight is missing",
        "visual.conv2.weight is not in the model",
        "text.token_embedding.weight is (7, 32), expected (528, 32)",
    ):
        assert part in str(raised.value)


def test_names_of_either_class_are_taken(tmp_path: Path) -> None:
    # class CLIP has the text tower's tensors at the top, CustomTextCLIP under "text.".
    at_top = ("positional_embedding", "token_embedding", "transformer", "ln_final", "text_proj")
    shapes = {
        f"text.{name}" if name.startswith(at_top) else name: shape
        for name, shape in RECORD["vit"]["shapes"].items()
    }
    folder = write_checkpoint(tmp_path / "vit", CASES["vit"], shapes)
    described = describe(folder)
    assert described.spec.roles["text_encoder"]().module is not None


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "vit")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"] = weights["visual.proj"].astype(np.int8)
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(SourceError, match=r"visual.proj is torch.int8, expected fp32"):
        describe(folder)


@pytest.mark.parametrize("name", ["merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer.json"])
def test_merges_are_read_from_any_file_that_has_them(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "vit")
    (folder / "merges.txt").unlink()
    lines = [f"{left} {right}" for left, right in MERGES]
    if name == "tokenizer.json":
        (folder / name).write_text(json.dumps({"model": {"merges": lines}}))
    elif name == "merges.txt":
        (folder / name).write_text("\n".join([*lines, ""]))
    else:
        (folder / name).write_bytes(gzip.compress("\n".join(["#", *lines]).encode()))
    assert clip_bpe_json(folder, ROWS)[1] == ROWS - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", None, "has no vocabulary: open_clip takes the one that it ships"),
        ("merges.txt", b"#version\n", "holds no merges"),
        ("merges.txt", b"t h e\n", "got 't h e', expected a pair"),
        ("merges.txt", b"t h\nzz e\n", "joins what none has made"),
        ("merges.txt", b"t h\n", "1 merges give 515 tokens, but text_cfg.vocab_size is 528"),
        ("bpe_simple_vocab_16e6.txt.gz", b"\x1f\x8b\x08damaged", "is damaged"),
        ("tokenizer.json", b"[]", "expected an object"),
    ],
)
def test_a_vocabulary_of_another_kind_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "vit")
    (folder / "merges.txt").unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        describe(folder)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # Letters that every version of Unicode in use has.
    text=st.text(st.characters(max_codepoint=0x1FFF, exclude_categories=["Cn"]), max_size=30)
    | st.text("the'S \u017f12_ß東🗼")
)
def test_a_text_is_split_as_clip_splits_it(text: str) -> None:
    """The pattern against SimpleTokenizer's, on texts without its special tokens."""
    cleaned = clean(text, "lower") or "a"
    found = [cleaned[start:end] for _, (start, end) in split().pre_tokenize_str(cleaned)]
    assert found == regex.findall(
        r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
        cleaned,
        regex.IGNORECASE,
    )


@lru_cache
def split() -> pre_tokenizers.PreTokenizer:
    """The first step of the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), CASES["vit"], {"one": [1]})
        document = json.loads(clip_bpe_json(path, ROWS)[0])
    pattern = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return pre_tokenizers.Split(Regex(pattern), "removed", invert=True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["vit", "eva02", "coca", "siglip", "clipa"]))
    config = json.loads(json.dumps(CASES[name]))
    part, defaults = data.draw(
        st.sampled_from(
            [
                (config["model_cfg"], open_clip_config._MODEL_DEFAULTS),
                (config["model_cfg"]["vision_cfg"], open_clip_config._VISION_DEFAULTS),
                (config["model_cfg"]["text_cfg"], open_clip_config._TEXT_DEFAULTS),
                (config["preprocess_cfg"], _PREPROCESSING),
            ]
        )
    )
    key = data.draw(st.sampled_from(sorted({*defaults, "nothing"})))
    part[key] = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
        | st.lists(st.integers(-1, 40), max_size=4)
        | st.dictionaries(st.sampled_from(["eps", "clean", "a"]), st.integers(), max_size=2)
    )  # fmt: skip
    if key == "hf_model_name":
        return  # its files are read
    shapes = {name: tuple(shape) for name, shape in RECORD[name]["shapes"].items()}
    source = Source(
        Path("/nowhere"), name, None, config, (), shapes, config_file="open_clip_config.json"
    )
    try:
        model = read_model_config(source.fields, len(shapes))
        _read_preprocessing(source, model.vision.image_size)
        _outline(source, model)
    except SourceError as error:
        refused = str(error)
    else:
        refused = None
    assert refused is None or "open_clip_config.json" in refused
