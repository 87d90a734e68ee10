"""LoRA adapters beside a base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mmedge.converters.families.loading import load_model
from mmedge.converters.sources.source import open_source
from mmedge.errors import SourceError

LAYER = "text_model.encoder.layers.1.self_attn.q_proj"
RANK, ALPHA = 4, 12
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
}


@pytest.fixture
def factors() -> dict[str, np.ndarray]:
    """A and B as peft saves them, in half precision."""
    rng = np.random.default_rng(0)
    return {
        f"base_model.model.{LAYER}.lora_A.weight": rng.normal(size=(RANK, 32)).astype(np.float16),
        f"base_model.model.{LAYER}.lora_B.weight": rng.normal(size=(32, RANK)).astype(np.float16),
    }


@pytest.fixture
def folder(clip_folder: Path, factors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A tiny CLIP with an adapter beside it."""
    folder = shutil.copytree(clip_folder, tmp_path / "model")
    write(folder, SETTINGS, factors)
    return folder


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def load(folder: Path, *, merge: bool) -> dict[str, torch.Tensor]:
    return load_model(open_source(str(folder), merge_adapter=merge)).state_dict()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_weights_are_w_plus_scaled_b_a(
    rank_stabilized: bool, folder: Path, factors: dict[str, np.ndarray]
) -> None:
    write(folder, {**SETTINGS, "use_rslora": rank_stabilized}, factors)
    base, merged = load(folder, merge=False), load(folder, merge=True)
    down, up = (value.astype(np.float32) for value in factors.values())
    scale = ALPHA / (RANK**0.5 if rank_stabilized else RANK)
    expected = base[f"{LAYER}.weight"] + scale * torch.from_numpy(up @ down)
    torch.testing.assert_close(merged.pop(f"{LAYER}.weight"), expected, atol=1e-5, rtol=1e-5)
    for name, value in merged.items():
        assert torch.equal(value, base[name]), name


def test_an_adapter_that_is_not_merged_is_reported(folder: Path) -> None:
    (note,) = open_source(str(folder)).notes
    assert "was not applied" in note
    assert "--merge-adapter" in note
    assert open_source(str(folder), merge_adapter=True).notes == ()


def test_there_must_be_an_adapter_to_merge(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="no adapter to merge"):
        open_source(str(folder), merge_adapter=True)


def test_an_adapter_alone_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match="adapter without its base model"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["visual_projection"]},
        {"alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "pissa"},
        {"lora_alpha": None},
        {"lora_alpha": 0},
        {"lora_alpha": "8"},
    ],
    ids=str,
)
def test_only_plain_lora_adapters_are_accepted(
    change: dict[str, Any], folder: Path, factors: dict[str, np.ndarray]
) -> None:
    write(folder, {**SETTINGS, **change}, factors)
    with pytest.raises(SourceError, match=rf"adapter_config\.json, {next(iter(change))}: got "):
        open_source(str(folder), merge_adapter=True)


@pytest.mark.parametrize("case", ["unknown layer", "no linear layer", "A alone", "another width"])
def test_tensors_that_do_not_fit_the_base_are_named(
    case: str, folder: Path, factors: dict[str, np.ndarray]
) -> None:
    (a, down), (b, up) = factors.items()
    elsewhere = {"unknown layer": "text_model.nothing", "no linear layer": "text_model.encoder"}
    if case in elsewhere:
        tensors = {name.replace(LAYER, elsewhere[case]): value for name, value in factors.items()}
    else:
        tensors = {a: down} if case == "A alone" else {a: down[:, :5].copy(), b: up}
    write(folder, SETTINGS, tensors)
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors: text_model"):
        load(folder, merge=True)
