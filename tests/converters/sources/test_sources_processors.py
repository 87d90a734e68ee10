"""Image processors and tokenizers that are wrong: named before the weights are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from describing import describe, describe_frozen
from models.tiny_models import clip_tokenizer

from mmedge.errors import SourceError
from mmedge.preprocess.config import TextConfig

Document = dict[str, Any]


def edit(folder: Path, file: str, change: Callable[[Document], object]) -> None:
    path = folder / file
    document = json.loads(path.read_text()) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture(params=["clip", "siglip"])
def folder(
    request: pytest.FixtureRequest, clip_folder: Path, siglip_folder: Path, tmp_path: Path
) -> Path:
    """A copy of a tiny source, to be broken."""
    original = {"clip": clip_folder, "siglip": siglip_folder}[request.param]
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def clip(clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_folder, tmp_path / "model")


WRONG_IMAGE_SETTINGS: list[Document] = [
    {"resample": None},
    {"resample": "bicubic"},
    {"resample": 9},
    {"resample": [3]},
    {"image_mean": None},
    {"image_mean": [0.5]},
    {"image_mean": ["a", "b", "c"]},
    {"image_std": None},
    {"image_std": [0, 0, 0]},
    {"image_std": [1, 1, 1e300]},
    {"image_std": True},
    {"rescale_factor": None},
    {"rescale_factor": 0},
    {"rescale_factor": 1e300},
    {"rescale_factor": "1/255"},
    {"do_resize": "yes"},
    {"do_normalize": 3},
    {"do_pad": True},
    {"size": None},
    {"size": {"shortest_edge": 0}},
    {"size": {"shortest_edge": 10**9}},
    {"size": {"shortest_edge": "32"}},
    {"size": {"height": 32}},
    {"size": {"height": 1.5, "width": 32}},
    {"size": {"longest_edge": 32}},
    {"size": "32"},
    {"size": []},
    {"image_processor_type": "NoSuchImageProcessor"},
    {"image_processor_type": 3},
]


@pytest.mark.parametrize("settings", WRONG_IMAGE_SETTINGS, ids=str)
def test_image_settings_that_are_wrong(settings: Document, folder: Path, tmp_path: Path) -> None:
    edit(folder, "preprocessor_config.json", lambda c: c.update(settings))
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        describe_frozen(folder, tmp_path / "out")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_processors_are_read_before_the_weights(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("mmedge.converters.families.towers.load_model")
    wrong = {"image_mean": [], "tokenizer_class": "Oracle"}
    edit(folder, file, lambda c: c.update(wrong))
    with pytest.raises(SourceError, match=file.replace(".", r"\.")):
        describe(folder)


@pytest.mark.parametrize(
    "crop", [None, 0, "32", {"height": 32}, {"height": 0, "width": 32}, {"height": None}], ids=str
)
def test_a_crop_that_is_wrong(crop: object, clip: Path, tmp_path: Path) -> None:
    edit(clip, "preprocessor_config.json", lambda c: c.update(crop_size=crop))
    with pytest.raises(SourceError, match=r"preprocessor_config\.json.*crop_size"):
        describe_frozen(clip, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"do_center_crop": False}, "any size"),
        ({"do_center_crop": False, "do_resize": False}, "any size"),
        ({"crop_size": {"height": 24, "width": 32}}, "24x32"),
        ({"do_center_crop": False, "size": {"height": 16, "width": 16}}, "16x16"),
    ],
    ids=str,
)
def test_images_must_come_out_as_the_graph_takes_them(
    settings: Document, got: str, clip: Path, tmp_path: Path
) -> None:
    edit(clip, "preprocessor_config.json", lambda c: c.update(settings))
    with pytest.raises(SourceError, match=f"gives images of {got}, but the model takes 32x32"):
        describe_frozen(clip, tmp_path / "out")


@pytest.mark.parametrize("image_size", [None, "32", [32, 32], 0])
def test_an_image_size_that_is_no_integer(image_size: object, folder: Path, tmp_path: Path) -> None:
    edit(folder, "config.json", lambda c: c["vision_config"].update(image_size=image_size))
    with pytest.raises(SourceError, match=r"config\.json, vision_config\.image_size: got"):
        describe_frozen(folder, tmp_path / "out")


@pytest.mark.parametrize("eos", [None, [513], -1, "513", 10**6], ids=str)
def test_an_end_token_that_is_no_id(eos: object, clip: Path, tmp_path: Path) -> None:
    edit(clip, "config.json", lambda c: c["text_config"].update(eos_token_id=eos))
    with pytest.raises(SourceError, match=r"config\.json.*eos_token_id"):
        describe_frozen(clip, tmp_path / "out")


BROKEN_TOKENIZERS: dict[str, object] = {
    "empty": {},
    "a list": [],
    "no model": {"version": "1.0", "model": None},
    "unknown model": {"version": "1.0", "model": {"type": "Oracle"}},
    "empty vocabulary": {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}},
    "words": "tokenizer",
    "deep": None,
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_a_tokenizer_that_is_none(case: str, clip: Path, tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    content = deep if case == "deep" else json.dumps(BROKEN_TOKENIZERS[case])
    (clip / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError):
        describe_frozen(clip, tmp_path / "out")


def test_a_damaged_sentencepiece_model(siglip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip_folder, tmp_path / "model")
    path = folder / "spiece.model"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SourceError, match="model"):
        describe_frozen(folder, tmp_path / "out")


def test_a_clip_without_a_padding_token_pads_with_its_end_token(clip: Path, tmp_path: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 20,
    }
    (clip / "tokenizer_config.json").write_text(json.dumps(settings))
    text = describe_frozen(clip, tmp_path / "out").spec.processors["text"]
    assert isinstance(text, TextConfig)
    assert text.pad_id == 513


@pytest.mark.parametrize("limit", [0.5, 0, -1, "20", [20], {}, False], ids=str)
def test_a_limit_of_tokens_that_is_no_number(limit: object, clip: Path, tmp_path: Path) -> None:
    edit(clip, "tokenizer_config.json", lambda c: c.update(model_max_length=limit))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json, model_max_length: got"):
        describe_frozen(clip, tmp_path / "out")


def test_a_siglip_without_a_padding_token_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip_folder, tmp_path / "model")
    edit(folder, "tokenizer_config.json", lambda c: c.update(pad_token=None))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json, pad_token_id: got None"):
        describe_frozen(folder, tmp_path / "out")


def test_a_token_beyond_the_table_is_named(clip: Path, tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<robot>"])
    tokenizer.save_pretrained(clip)
    with pytest.raises(SourceError, match=r"'<robot>' the id 514, .*has 514 rows"):
        describe_frozen(clip, tmp_path / "out")


def bpe_files(folder: Path, merges: list[str], extra: list[str]) -> None:
    """Write vocab.json and merges.txt as OpenAI's: letters, what merges make, special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    for path in folder.glob("tokenizer*"):
        path.unlink()
    letters = sorted(ByteLevel.alphabet())
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *made]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *merges, *extra]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


MERGES = ["a t</w>", "c at</w>", "r e", "re d</w>"]


def test_merges_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    from models.tiny_models import write_clip

    ids = []
    for name, extra in (("own", []), ("full", ["d o", "do g</w>", "a t"])):
        folder = write_clip(tmp_path / name, eos_token_id=517, vocab_size=518)
        bpe_files(folder, MERGES, extra)
        texts = describe(folder).freeze(tmp_path / f"{name}-out")["text"]
        ids.append(texts(["a red cat and a dog"])["input_ids"].tolist())
    assert ids[0] == ids[1]
    assert 513 in ids[0][0]  # "cat</w>": merges are in use


def test_merges_of_another_vocabulary_are_named(clip: Path, tmp_path: Path) -> None:
    bpe_files(clip, MERGES, [])
    (clip / "merges.txt").write_text("#version: 0.2\nq z\n")
    with pytest.raises(SourceError, match=r"merges\.txt does not belong to vocab\.json.*'at</w>'"):
        describe_frozen(clip, tmp_path / "out")
