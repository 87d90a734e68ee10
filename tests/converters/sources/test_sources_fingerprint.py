"""The fingerprint of an embedding space depends on what computes, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from describing import describe
from models.tiny_models import write_clip
from safetensors.numpy import load_file, save_file


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def towers(**changes: object) -> Callable[[Path], None]:
    """A change of both towers' configuration."""

    def apply(folder: Path) -> None:
        def change(config: dict[str, object]) -> None:
            for name in ("text_config", "vision_config"):
                tower = config[name]
                assert isinstance(tower, dict)
                tower.update(changes)

        edit_json(folder / "config.json", change)

    return apply


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    return apply


def shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: tensors[name] for name in names if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def nudge(tensors: dict[str, np.ndarray]) -> None:
    name = "text_model.encoder.layers.1.mlp.fc2.bias"
    tensors[name] = tensors[name] + np.float32(1e-6)


def swap(tensors: dict[str, np.ndarray]) -> None:
    first, second = (f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def add_second_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")


def notes(config: dict[str, object]) -> None:
    config.update(note="mine", transformers_version="5.0.0", _name_or_path="elsewhere")


def preprocessing(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", lambda c: c.update(resample=2))


SAME: dict[str, Callable[[Path], None]] = {
    "shards": shard,
    "a second file beside the weights": add_second_file,
    "keys that compute nothing": lambda folder: edit_json(folder / "config.json", notes),
    "training": towers(initializer_range=0.5, attention_dropout=0.1),
    "a default written out": towers(hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "the scale of scores": weights(lambda t: t.update(logit_scale=np.asarray(1.0, np.float32))),
}
OTHER: dict[str, Callable[[Path], None]] = {
    "activation": towers(hidden_act="gelu"),
    "epsilon": towers(layer_norm_eps=1e-2),
    "heads": towers(num_attention_heads=4),
    "one weight": weights(nudge),
    "two weights exchanged": weights(swap),
    "preprocessing": preprocessing,
}


@pytest.fixture(scope="module")
def base_space(clip_folder: Path) -> str:
    return describe(clip_folder).space


@pytest.mark.parametrize("case", SAME)
def test_the_same_model_is_one_space(
    case: str, clip_folder: Path, base_space: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    SAME[case](folder)
    assert describe(folder).space == base_space


@pytest.mark.parametrize("case", OTHER)
def test_other_computations_are_another_space(
    case: str, clip_folder: Path, base_space: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    OTHER[case](folder)
    assert describe(folder).space != base_space


def test_another_pooling_is_another_space(tmp_path: Path, base_space: str) -> None:
    assert describe(write_clip(tmp_path / "legacy", eos_token_id=2)).space != base_space


def test_half_precision_weights_are_the_space_of_what_they_hold(
    clip_folder: Path, tmp_path: Path
) -> None:
    spaces = []
    for name, dtype in (("half", np.float16), ("full", np.float32)):
        folder = shutil.copytree(clip_folder, tmp_path / name)

        def cast(tensors: dict[str, np.ndarray], dtype: type = dtype) -> None:
            for key, value in tensors.items():
                tensors[key] = value.astype(np.float16).astype(dtype)

        weights(cast)(folder)
        spaces.append(describe(folder).space)
    assert spaces[0] == spaces[1]
