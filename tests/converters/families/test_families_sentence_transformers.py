"""Text encoders of sentence-transformers, from its folders to a bundle that embeds texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from describing import describe
from models.tiny_models import BERT_CONTEXT, word_pieces
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel

import mmedge
from mmedge import Encoder
from mmedge.bundle import open_bundle
from mmedge.converters.families.reference import check_reference
from mmedge.converters.sources.sentence_modules import POOLINGS
from mmedge.converters.sources.source import open_source
from mmedge.errors import SourceError
from mmedge.models import verify_bundle
from mmedge.preprocess.config import TextConfig
from mmedge.specs import Array

TEXTS = ["a red circle", "  X ", "two BLUE stars, left of a ring", "word " * 60]


@pytest.fixture(scope="module")
def encoder(sentence_bundle: Path) -> Iterator[Encoder]:
    with Encoder.load(sentence_bundle, precision="fp32") as model:
        yield model


@pytest.fixture
def copy(sentence_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sentence_folder, tmp_path / "copy")


def edit(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    """Replace a JSON file by what `change` makes of it, or keeps in place."""
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    made = change(values)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(values if made is None else made))


def tokens(folder: Path, texts: list[str]) -> tuple[Array, Array]:
    """Return transformers' token embeddings (B, T, W) and the mask (B, T), as the library runs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        [text.strip() for text in texts],
        padding=True,
        truncation=True,
        max_length=BERT_CONTEXT - 8,
        return_tensors="pt",
    )
    with torch.inference_mode():
        hidden = BertModel.from_pretrained(folder).eval()(**given).last_hidden_state
    return hidden.numpy(), given["attention_mask"].numpy()


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_texts_embed_by_every_module(encoder: Encoder, sentence_folder: Path) -> None:
    hidden, mask = tokens(sentence_folder, TEXTS)
    mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    dense = load_file(sentence_folder / "2_Dense" / "model.safetensors")
    weight, bias = dense["linear.weight"].numpy(), dense["linear.bias"].numpy()
    expected = unit(np.tanh(mean @ weight.T + bias))
    got = encoder.encode_text(TEXTS)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert expected.std(axis=0).mean() > 0.01  # they differ
    # Neither padding nor white space at the ends has an effect.
    np.testing.assert_allclose(encoder.encode_text(" a red circle\n"), expected[:1], atol=2e-5)


def test_the_bundle_is_verified_and_judged_on_its_texts(
    sentence_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(sentence_bundle)
    assert all(result.passed for result in verify_bundle(bundle))
    quality = {v.name: v.quality for v in bundle.manifest.roles["text_encoder"].variants}
    for name in ("int8-dynamic", "int8-static"):
        figures = quality[name]
        assert figures is not None
        assert figures.data == "held-out.jsonl: 20 captions"
        assert figures.value("cosine_min") > 0.98
    with mmedge.Index.create(tmp_path / "index", bundle=sentence_bundle) as index:
        index.add(texts=TEXTS[:3], ids=["a", "b", "c"])
        assert index.search("a red circle", k=1)[0].id == "a"


def pooled(name: str, hidden: Array, mask: Array) -> Array:
    """One pooling, text by text without padding."""
    rows = []
    for row, kept in zip(hidden, mask, strict=True):
        real = row[: kept.sum()]
        places = np.arange(1, len(real) + 1)[:, None]
        rows.append(
            {
                "cls": real[0],
                "max": real.max(axis=0),
                "mean": real.mean(axis=0),
                "mean_sqrt_len_tokens": real.sum(axis=0) / np.sqrt(len(real)),
                "weightedmean": (real * places).sum(axis=0) / places.sum(),
                "lasttoken": real[-1],
            }[name]
        )
    return np.array(rows)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        *(({POOLINGS[name]: True, POOLINGS["mean"]: name == "mean"}, (name,)) for name in POOLINGS),
        ({}, ("mean",)),
        ({"pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["lasttoken", "cls"]}, ("cls", "lasttoken")),
    ],
)
def test_every_pooling(config: dict[str, object], names: tuple[str, ...], copy: Path) -> None:
    edit(copy, "1_Pooling/config.json", lambda _: {"word_embedding_dimension": 32, **config})
    edit(copy, "modules.json", lambda modules: modules[:2])
    described = describe(copy)
    spec = described.spec.roles["text_encoder"]()
    hidden, mask = tokens(copy, TEXTS)
    given = AutoTokenizer.from_pretrained(copy)(
        [text.strip() for text in TEXTS],
        padding=True,
        truncation=True,
        max_length=BERT_CONTEXT - 8,
        return_tensors="pt",
    )
    assert spec.module is not None
    with torch.inference_mode():
        got = spec.module(given["input_ids"], given["attention_mask"]).numpy()
    expected = unit(np.concatenate([pooled(name, hidden, mask) for name in names], axis=1))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert spec.outputs[0].shape == ("batch", 32 * len(names))


TINY = {"num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 40, **TINY}


@pytest.mark.parametrize(
    ("name", "sizes", "longest"),
    [
        ("Bert", SIZES, 32),
        ("Roberta", {**SIZES, "pad_token_id": 0, "max_position_embeddings": 30}, 29),
        ("XLMRoberta", {**SIZES, "pad_token_id": 0}, 32),
        ("Camembert", {**SIZES, "pad_token_id": 0}, 32),
        ("MPNet", {**SIZES, "pad_token_id": 0}, 32),
        ("DistilBert", {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}, 32),
        ("ModernBert", {**SIZES, "pad_token_id": 0, "global_attn_every_n_layers": 1}, 32),
    ],
)
def test_every_architecture_is_described_as_its_model_computes(
    name: str, sizes: dict[str, Any], longest: int, copy: Path, tmp_path: Path
) -> None:
    for file in (copy / "config.json", copy / "model.safetensors"):
        file.unlink()
    tokenizer = word_pieces()
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **sizes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(copy)
    described = describe(copy)
    processors = described.freeze(tmp_path / "out")
    spec = described.spec.roles["text_encoder"]()
    reference = described.spec.references["text_encoder"]
    check_reference(described.source, "text_encoder", spec, processors, reference)
    processor = processors["text"].config
    assert isinstance(processor, TextConfig)
    assert processor.max_length == longest


def test_lower_case_is_the_device_s_too(copy: Path, tmp_path: Path) -> None:
    edit(copy, "sentence_bert_config.json", lambda values: values.update(do_lower_case=True))
    described = describe(copy)
    config = described.spec.processors["text"]
    assert isinstance(config, TextConfig)
    assert config.cleaning == "strip_lower"
    described.freeze(tmp_path / "out")


def test_prompts_are_named_in_the_report(sentence_folder: Path) -> None:
    (note,) = open_source(str(sentence_folder)).notes
    assert "prompts (query), which mmedge does not put before texts" in note


def test_layers_above_are_part_of_the_embedding_space(sentence_folder: Path, copy: Path) -> None:
    def space(folder: Path) -> str:
        return describe(folder).space

    first = space(sentence_folder)
    assert space(copy) == first
    edit(copy, "1_Pooling/config.json", lambda v: v.update(pooling_mode="cls"))
    pooling = space(copy)
    weights = load_file(copy / "2_Dense" / "model.safetensors")
    weights["linear.bias"] += 1
    save_file(weights, copy / "2_Dense" / "model.safetensors")
    assert len({first, pooling, space(copy)}) == 3


def test_a_clip_of_the_library_is_a_clip(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "0_CLIPModel")
    entry = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": f"{TYPE}.CLIPModel"}
    (tmp_path / "modules.json").write_text(json.dumps([entry]))
    described = describe(tmp_path)
    assert described.family == "clip"
    assert described.space == describe(clip_folder).space


TYPE = "sentence_transformers.models"


def first(**changes: object) -> Callable[[Any], object]:
    return lambda modules: [{**modules[0], **changes}, *modules[1:]]


def third(**changes: object) -> Callable[[Any], object]:
    return lambda modules: [*modules[:2], {**modules[2], **changes}, *modules[3:]]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("modules.json", lambda _: {"a": 1}, "modules.json: expected a list of 1 to 16 modules"),
        ("modules.json", lambda _: [], "modules.json: expected a list of 1 to 16 modules"),
        ("modules.json", lambda _: ["x"], "modules.json, 0: got str, expected an object"),
        ("modules.json", lambda m: m[:1], "modules.json: expected a Pooling as 1"),
        ("modules.json", lambda m: m[:1] + m[2:], r"modules.json, 1.type: .*a Pooling as module 1"),
        ("modules.json", first(type="evil.Transformer"), "0.type: .*Other code is not run"),
        ("modules.json", first(path="../.."), "0.path: .*the name of a folder beside"),
        ("modules.json", first(path="/etc"), "0.path: .*the name of a folder beside"),
        ("modules.json", first(path="1_Pooling"), "0.path: .*beside modules.json"),
        ("modules.json", third(type=f"{TYPE}.LSTM"), "2.type: .*Dense, Normalize or Dropout"),
        ("1_Pooling/config.json", lambda v: v.update(word_embedding_dimension=31), "expected 32"),
        ("1_Pooling/config.json", lambda v: v.update(pooling_mode="best"), "one or more of cls"),
        ("1_Pooling/config.json", lambda v: v.update(pooling_mode=[]), "one or more of cls"),
        (
            "1_Pooling/config.json",
            lambda v: v.update(pooling_mode_mean_tokens=False),
            "pooling_mode_mean_tokens: got False, expected true",
        ),
        ("2_Dense/config.json", lambda v: v.update(in_features=31), "in_features: got 31"),
        (
            "2_Dense/config.json",
            lambda v: v.update(out_features=9),
            r"holds .*expected .*\(9, 32\)",
        ),
        (
            "2_Dense/config.json",
            lambda v: v.update(activation_function="os.system"),
            "activation_function: got 'os.system', expected one of GELU",
        ),
        (
            "config_sentence_transformers.json",
            lambda v: v.update(default_prompt_name="query"),
            "default_prompt_name: got 'query', expected null",
        ),
        (
            "sentence_bert_config.json",
            lambda v: v.update(max_seq_length=0),
            "max_seq_length: got 0, expected an integer",
        ),
        (
            "sentence_bert_config.json",
            lambda v: v.update(tokenizer_args={"a": 1}),
            "tokenizer_args: .*passes no arguments on",
        ),
        ("config.json", lambda v: v.update(intermediate_size=65), "do not fit config.json"),
        ("config.json", lambda v: v.update(vocab_size=90), "table has 90 rows"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    file: str, change: Callable[[Any], object], expected: str, copy: Path
) -> None:
    edit(copy, file, change)
    with pytest.raises(SourceError, match=expected):
        describe(copy)


@pytest.mark.parametrize("name", ["dot", "euclidean", ["cosine"]])
def test_lengths_that_count_are_refused(name: object, copy: Path) -> None:
    file = "config_sentence_transformers.json"
    edit(copy, file, lambda values: values.update(similarity_fn_name=name))
    if isinstance(name, str):
        describe(copy)  # its last module is Normalize
    edit(copy, "modules.json", lambda modules: modules[:3])
    with pytest.raises(SourceError, match=r"similarity_fn_name: .*expected cosine, or Normalize"):
        describe(copy)
    edit(copy, file, lambda values: values.update(similarity_fn_name="cosine"))
    describe(copy)


def test_a_dense_layer_in_a_pickle_is_refused(copy: Path) -> None:
    (copy / "2_Dense" / "model.safetensors").rename(copy / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"2_Dense holds no model.safetensors; a pickle is not"):
        describe(copy)
