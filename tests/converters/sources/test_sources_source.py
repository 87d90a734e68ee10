from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from mmedge.converters.families import FAMILIES, MODEL_TYPES, check_supported, family_of
from mmedge.converters.sources.source import open_source
from mmedge.errors import SourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest folder that opens as a source."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    save_file({"a": np.zeros((64, 64), np.float32)}, folder / "model.safetensors")
    return folder


def test_a_folder_opens(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.model_type == "clip"
    assert source.revision is None
    assert source.weight_files == (folder / "model.safetensors",)


def test_the_name_holds_no_path_of_this_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_source(str(folder)).name == "model"
    monkeypatch.chdir(folder.parent)
    assert open_source("./model").name == "model"
    assert open_source("../" + folder.parent.name + "/model").name == "model"
    monkeypatch.chdir(folder)
    assert open_source(".").name == "model"
    monkeypatch.chdir(folder.parent.parent)
    assert open_source(f"{folder.parent.name}/model").name == f"{folder.parent.name}/model"


def test_shards_are_read_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("b.safetensors", "a.safetensors"):
        save_file({name[0]: np.ones(3, np.float32)}, folder / name)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in open_source(str(folder)).weight_files] == [
        "a.safetensors",
        "b.safetensors",
    ]
    (folder / "b.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names b\.safetensors, which is missing"):
        open_source(str(folder))


def test_an_index_may_not_point_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="outside its folder"):
        open_source(str(folder))


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "./nowhere", "a/b/c", "no such name"])
def test_a_missing_folder_is_named(spec: str) -> None:
    with pytest.raises(SourceError, match="No such folder") as caught:
        open_source(spec)
    assert spec in str(caught.value)


def test_a_file_is_not_a_source(folder: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        open_source(str(folder / "config.json"))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="holds no weights"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_a_pickle_is_refused_unopened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(SourceError, match="pickle") as caught:
        open_source(str(folder))
    assert name in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": 3}'])
def test_an_empty_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(SourceError, match=r"config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 60, 5000])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="not a whole safetensors file") as caught:
        open_source(str(folder))
    assert str(path) in str(caught.value)


def test_an_unknown_architecture_is_named_with_the_supported_ones(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "perceptron"}')
    with pytest.raises(SourceError, match=r"'perceptron'.*Supported families: .*clip, .*siglip"):
        family_of(open_source(str(folder)))


@pytest.mark.parametrize(
    ("model_type", "classes", "nearest"),
    [
        ("mixtral", ["MixtralForCausalLM"], "mistral, .*qwen3"),
        ("phi3", ["Phi3ForCausalLM"], "llama"),
        ("siglip_nova", None, "siglip"),
        ("a-new-thing", 3, None),
    ],
)
def test_an_architecture_is_refused_by_config_json_alone(
    folder: Path, model_type: str, classes: object, nearest: str | None
) -> None:
    config = {"model_type": model_type, "architectures": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=f"'{model_type}', which mmedge cannot") as caught:
        open_source(str(folder), check=check_supported)
    found = re.search(r"nearest that it can: (.*)\. Supported", str(caught.value))
    assert (found is None) == (nearest is None)
    assert nearest is None or (found and re.search(nearest, found[1]))


def test_the_check_imports_no_torch(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "phi3"}')
    script = (
        "import sys\n"
        "from mmedge.converters import ConvertConfig, convert\n"
        "try:\n"
        "    convert(ConvertConfig(sys.argv[1], sys.argv[1] + '.mmedge'))\n"
        "except Exception as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot convert" in done.stdout
    assert done.stdout.rstrip().endswith("False")


def test_the_listed_types_are_those_that_families_take(folder: Path) -> None:
    source = open_source(str(folder))
    (folder / "modules.json").write_text("[]")
    for family, place in FAMILIES.items():
        module, name = place.split(":")
        one = getattr(importlib.import_module(module), name)
        for kind in MODEL_TYPES.get(family, (family,)):
            graph = folder if kind == "onnx" else None
            assert one.matches(replace(source, config={"model_type": kind}, graph=graph)), kind


def test_a_hub_id_is_refused_before_its_weights_are_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.json").write_text('{"model_type": "phi3"}')
    asked: list[list[str]] = []

    def fetch(_repository: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(SourceError, match="phi3"):
        open_source("someone/phi", check=check_supported)
    assert asked == [["config.json", "open_clip_config.json"]]


def test_remote_code_is_not_run(folder: Path) -> None:
    config = {"model_type": "clip", "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (note,) = open_source(str(folder)).notes
    assert "is not run" in note


def test_a_revision_belongs_to_a_hub_id(folder: Path) -> None:
    with pytest.raises(SourceError, match="has no revision 'main'"):
        open_source(str(folder), "main")


def test_a_hub_id_is_fetched_without_code_or_pickles_and_pinned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    asked: dict[str, object] = {}

    def fetch(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    source = open_source("someone/some-clip", "v1")
    assert (source.name, source.revision) == ("someone/some-clip", commit)
    assert asked["repository"] == "someone/some-clip"
    assert asked["revision"] == "v1"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns)
    wanted = {
        "config.json",
        "model.safetensors",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    }
    others = {"onnx/config.json", "1_Pooling/onnx/m.safetensors", "2_D/pytorch_model.bin"}
    ignored = asked["ignore_patterns"]
    assert isinstance(ignored, list)
    kept = filter_repo_objects(wanted | others, allow_patterns=patterns, ignore_patterns=ignored)
    assert set(kept) == wanted


def test_an_unreachable_hub_is_a_source_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(repository: str, **options: object) -> str:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"someone/some-clip.*hub cannot be reached"):
        open_source("someone/some-clip")
