"""Configuration that is wrong: one sentence with file and key, before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.converters.families.loading import load_model
from mmedge.converters.sources.config import Fields, check_architecture
from mmedge.converters.sources.source import open_source
from mmedge.errors import MmedgeError, SourceError

Document = dict[str, Any]

# Keys of a tower, and values that no tower has.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WRONG_NUMBERS = (None, 0, -1, 10**9, 10**30, 1.5, "32", True, [], [0], {}, "\u0000")


def edit(folder: Path, file: str, change: Callable[[Document], object]) -> None:
    path = folder / file
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture(params=["clip", "siglip"])
def folder(
    request: pytest.FixtureRequest, clip_folder: Path, siglip_folder: Path, tmp_path: Path
) -> Path:
    """A copy of a tiny source, to be broken."""
    original = {"clip": clip_folder, "siglip": siglip_folder}[request.param]
    return shutil.copytree(original, tmp_path / "model")


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", [*SIZES, "layer_norm_eps"])
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_sizes_are_bounded(part: str, key: str, value: object, folder: Path) -> None:
    edit(folder, "config.json", lambda c: c[part].update({key: value}))
    with pytest.raises(SourceError, match=rf"config\.json, {part}\.{key}: got .*expected"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("part", "change", "key"),
    [
        ("vision_config", {"image_size": 0}, "image_size"),
        ("vision_config", {"image_size": "32"}, "image_size"),
        ("vision_config", {"patch_size": 0}, "patch_size"),
        ("vision_config", {"patch_size": 33}, "patch_size"),
        ("vision_config", {"num_channels": 1}, "num_channels"),
        ("vision_config", {"num_attention_heads": 3}, "num_attention_heads"),
        ("text_config", {"vocab_size": 10**8}, "vocab_size"),
        ("text_config", {"max_position_embeddings": 10**8}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_sizes_that_contradict_each_other(
    part: str, change: Document, key: str, folder: Path
) -> None:
    edit(folder, "config.json", lambda c: c[part].update({"image_size": 32, **change}))
    with pytest.raises(SourceError, match=rf"config\.json, {part}\.{key}: got "):
        open_source(str(folder))


@pytest.mark.parametrize("value", [3, "x", [1], True], ids=repr)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_that_is_no_object(part: str, value: object, folder: Path) -> None:
    edit(folder, "config.json", lambda c: c.update({part: value}))
    with pytest.raises(SourceError, match=rf"config\.json, {part}: got .*expected an object"):
        open_source(str(folder))


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantized_weights_are_refused_with_a_fix(
    part: str | None, method: str, folder: Path
) -> None:
    quantized = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit(folder, "config.json", lambda c: (c[part] if part else c).update(quantized))
    with pytest.raises(SourceError, match=rf"quantization_config: .*\({method}\).*dequantize"):
        open_source(str(folder))


BROKEN_FILES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "cl',
    "a list": b"[]",
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "clip"}'.encode("utf-16"),
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"a": NaN}',
    "a long number": b'{"a": ' + b"9" * 100_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "large": b'{"a": "' + b"x" * (17 << 20) + b'"}',
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_file_that_holds_no_object(
    file: str, content: bytes, clip_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises(SourceError, match=file.replace(".", r"\.")):
        open_source(str(folder))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "broken link"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "more.safetensors", "tokenizer.json", "merges.txt"],
)
def test_only_regular_files_are_opened(
    file: str, kind: str, clip_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    path = folder / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(SourceError, match=f"{file} is not a regular file"):
        open_source(str(folder))


def test_a_huge_tokenizer_is_not_read(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    os.truncate(folder / "tokenizer.json", 1 << 30)  # a hole: no disk is used
    with pytest.raises(SourceError, match=r"tokenizer\.json is larger than 256 MiB"):
        open_source(str(folder))


def test_several_files_without_an_index_are_named(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(SourceError, match=r"a\.safetensors, b\.safetensors: expected model\."):
        open_source(str(folder))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 4000, "intermediate_size": 6000, "num_hidden_layers": 30},
        {"max_position_embeddings": 10**7},
    ],
    ids=str,
)
def test_a_model_larger_than_its_checkpoint_is_not_built(sizes: Document, folder: Path) -> None:
    edit(folder, "config.json", lambda c: c["text_config"].update(sizes))
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=r"config\.json describes a model of \d+ values"):
        load_model(source)


def test_keys_that_are_not_the_architecture_s_are_not_passed_on(folder: Path) -> None:
    foreign = {
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "auto_map": {"AutoModel": "evil.Model"},
        "fusion_config": {"a": 1},
        "return_dict": False,
        "transformers_weights": "elsewhere.bin",
        "cls": 1,
        "self": 1,
    }
    edit(folder, "config.json", lambda c: [c.update(foreign), c["text_config"].update(foreign)])
    model: Any = load_model(open_source(str(folder)))
    for config in (model.config, model.config.text_config, model.config.vision_config):
        assert config._attn_implementation == "sdpa"
        assert not any(hasattr(config, key) for key in ("auto_map", "fusion_config", "cls"))
        assert config.return_dict


def test_a_broken_config_loads_nothing_heavy(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    edit(folder, "config.json", lambda c: c["text_config"].update(num_attention_heads=0))
    code = (
        "import sys\n"
        "from mmedge.converters.sources.source import open_source\n"
        "from mmedge.errors import SourceError\n"
        "try:\n"
        "    open_source(sys.argv[1])\n"
        "except SourceError:\n"
        "    print(sorted({'torch', 'transformers', 'optimum', 'onnx'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from([*SIZES, "image_size", "patch_size", "num_channels", "text_config"]), _ANY)
def test_any_value_passes_or_is_named(key: str, value: object) -> None:
    config = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_attention_heads": 2}
    fields = Fields(Path("config.json"), {"vision_config": {**config, key: value}})
    message = ""
    try:
        check_architecture(fields, {"a": (64, 64)})
    except MmedgeError as error:
        message = str(error)
    assert not message or "config.json, vision_config" in message
