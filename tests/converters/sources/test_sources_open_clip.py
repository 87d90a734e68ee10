"""Which folders and names are read in open_clip's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmedge.converters.sources import source as sources
from mmedge.converters.sources.source import OPEN_CLIP, is_hub_id, open_source
from mmedge.errors import SourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in open_clip's format, as far as a source looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "open_clip_config.json", {"model_cfg": {"embed_dim": 2}})
    save_file({"visual.proj": np.zeros((2, 2), np.float32)}, folder / "open_clip_model.safetensors")
    return folder


def write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_folder_in_open_clips_format_is_read(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.model_type == OPEN_CLIP
    assert source.fields.file.name == "open_clip_config.json"
    assert source.fields.section("model_cfg") is not None
    assert source.shapes == {"visual.proj": (2, 2)}
    assert source.notes == ()


@pytest.mark.parametrize(
    ("config", "text", "read"),
    [
        ({"model_type": "clip"}, {}, "clip"),
        ({"architecture": "eva02_base_patch16_clip_224"}, {}, OPEN_CLIP),  # timm's own file
        ({"model_type": "roberta"}, {"hf_model_name": "roberta-base"}, OPEN_CLIP),
    ],
)
def test_a_config_json_beside_it(
    config: dict[str, Any], text: dict[str, Any], read: str, folder: Path
) -> None:
    write(folder, "config.json", config)
    write(folder, "open_clip_config.json", {"model_cfg": {"text_cfg": text}})
    assert open_source(str(folder)).model_type == read
    assert open_source(f"local-dir:{folder}").model_type == OPEN_CLIP


def test_open_clips_own_weights_come_first(folder: Path) -> None:
    save_file({"visual.trunk": np.zeros(1, np.float32)}, folder / "model.safetensors")
    assert open_source(str(folder)).weight_files[0].name == "open_clip_model.safetensors"
    (folder / "open_clip_model.safetensors").unlink()
    assert open_source(str(folder)).weight_files[0].name == "model.safetensors"


def test_a_decoder_that_is_left_out_is_reported(folder: Path) -> None:
    save_file({"text_decoder.x": np.zeros(1, np.float32)}, folder / "open_clip_model.safetensors")
    (note,) = open_source(str(folder)).notes
    assert "text decoder" in note


def test_a_hub_id_with_open_clips_prefix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "config.json", {"model_type": "clip"})
    fetched = []

    def fetch(repository: str, revision: str | None) -> Path:
        fetched.append((repository, revision))
        return folder

    monkeypatch.setattr(sources, "_fetch", fetch)
    source = open_source("hf-hub:timm/some-clip", "main")
    assert fetched == [("timm/some-clip", "main")]
    assert (source.model_type, source.name) == (OPEN_CLIP, "hf-hub:timm/some-clip")
    assert is_hub_id("hf-hub:timm/some-clip")
    assert not is_hub_id(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("hf-hub:../x", {}, "expected a hub id after hf-hub:"),
        ("local-dir:{}", {"revision": "main"}, "has no revision 'main'"),
        ("local-dir:{}", {"merge_adapter": True}, "no adapter that can be merged"),
        ("local-dir:{}/nowhere", {}, "has no open_clip_config.json"),
    ],
)
def test_other_names_are_refused(
    spec: str, options: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(spec.format(folder), **options)


@pytest.mark.parametrize("pickle", [False, True])
def test_missing_weights_are_named(pickle: bool, folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    if pickle:
        (folder / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"open_clip_model.safetensors") as raised:
        open_source(str(folder))
    assert ("open_clip_pytorch_model.bin" in str(raised.value)) == pickle
