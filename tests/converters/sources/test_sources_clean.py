"""A source cannot name code, kernels or files for transformers to open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmedge.converters.sources.clean import clean_copy
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import open_source
from mmedge.converters.sources.tokenizer import backend_json, load_tokenizer
from mmedge.errors import SourceError

MARK = "raise SystemExit('code of the source')\n"
CODE = {
    "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoImageProcessor": "someone/x--evil.P"},
    "_attn_implementation": "someone/kernel",
    "custom_generate": "someone/generate",
    "gguf_file": "/etc/hostname",
    "init_inputs": ["/etc/hostname"],
    "merges_file": "/etc/hostname",
    "tokenizer_file": "/etc/hostname",
    "tokenizer_object": {},
    "use_kernels": True,
    "vocab_file": "/etc/hostname",
}
SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_folder, tmp_path / "model")


def edit(path: Path, **values: object) -> None:
    old = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(old | values))


def test_settings_that_name_code_or_files_have_no_effect(folder: Path, clip_folder: Path) -> None:
    honest = open_source(str(clip_folder))
    for name in SETTINGS:
        edit(folder / name, **CODE)
    nested = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    edit(folder / "processor_config.json", image_processor=nested)
    (folder / "evil.py").write_text(MARK)
    hostile = open_source(str(folder))
    expected = backend_json(honest, load_tokenizer(honest))
    assert backend_json(hostile, load_tokenizer(hostile)) == expected
    assert read_image_preprocessing(hostile, 32) == read_image_preprocessing(honest, 32)


def test_a_copy_holds_listed_keys_alone(folder: Path) -> None:
    for name in SETTINGS:
        edit(folder / name, **CODE)
    edit(folder / "processor_config.json", image_processor=CODE)
    (folder / "evil.py").write_text(MARK)
    with clean_copy(folder) as copy:
        for path in copy.iterdir():
            assert path.suffix in {".json", ".txt", ".model"}
            assert not any(f'"{key}"' in path.read_text("utf-8") for key in CODE), path
    assert not copy.exists()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}),
        ("model", []),
    ],
)
def test_a_tokenizer_bomb_is_refused_before_it_is_loaded(
    folder: Path, part: str, value: object
) -> None:
    edit(folder / "tokenizer.json", **{part: value})
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=r"model/tokenizer\.json: not a tokenizer that"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "tokenizer_class", "CLIPModel"),
        ("tokenizer_config.json", "tokenizer_class", "AutoModelForCausalLM"),
        ("tokenizer_config.json", "tokenizer_class", ["CLIPTokenizer"]),
        ("tokenizer_config.json", "tokenizer_class", "someone/x--evil.Tokenizer"),
        ("config.json", "tokenizer_class", "Trainer"),
        ("preprocessor_config.json", "image_processor_type", "AutoModel"),
        ("preprocessor_config.json", "feature_extractor_type", "pipeline"),
    ],
)
def test_a_class_is_a_tokenizer_s_or_a_processor_s(
    folder: Path, name: str, key: str, value: object
) -> None:
    """transformers looks the name up among all its classes, models included."""
    edit(folder / name, **{key: value})
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=rf"{name}, {key}: got "):
        load_tokenizer(source)
    with pytest.raises(SourceError, match=rf"{name}, {key}: got "):
        read_image_preprocessing(source, 32)


def test_keys_that_are_left_out_are_named(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", new_setting=1, name_or_path="x", _hash="y")
    edit(folder / "preprocessor_config.json", auto_map={})
    assert open_source(str(folder)).notes == (
        f"{folder.name}: keys of preprocessor_config.json that mmedge does not read: auto_map.",
        f"{folder.name}: keys of tokenizer_config.json that mmedge does not read: new_setting.",
    )
