"""The search on the trained models: the budget holds on data that neither step of it has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from drawing import render
from evaluate import TorchEncoders
from generate import captioned
from metrics import recall_at_k

import mmedge
from mmedge.converters.config import ConvertConfig
from mmedge.converters.request import convert

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
_BUDGET = 0.01
_SEARCHED_ON, _FRESH = 400, 500


def _written(folder: Path, split: str, count: int, skip: int = 0) -> Path:
    """Write scenes of a split with their captions, the first ones left out."""
    folder.mkdir()
    lines = []
    for index, (scene, caption) in enumerate(captioned(split, skip + count)[skip:]):
        render(scene, 224).save(folder / f"{index:04d}.png")
        lines.append(json.dumps({"image": f"{index:04d}.png", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["clip", "clip-outliers"])
def test_auto_holds_its_budget_where_naive_int8_does_not(name: str, tmp_path: Path) -> None:
    from naive_int8 import NaiveInt8

    report = convert(
        ConvertConfig(
            str(SHAPES / name),
            tmp_path / "auto.mmedge",
            ("auto",),
            calibration=_written(tmp_path / "calibration", "calibration", 64),
            evaluate=_written(tmp_path / "evaluation", "test", _SEARCHED_ON),
            max_drop=_BUDGET,
        )
    )
    assert any(role.default != "fp32" for role in report.searched.values())
    pairs = captioned("test", _SEARCHED_ON + _FRESH)[_SEARCHED_ON:]
    rendered = [render(scene, 224) for scene, _ in pairs]
    texts = [text for _, text in pairs]
    fp32 = TorchEncoders(SHAPES / name)
    reference = recall_at_k(fp32.texts(texts), fp32.images(rendered), 1)
    with mmedge.load(tmp_path / "auto.mmedge", backend="onnxruntime") as clip:
        # One at a time, as dynamic quantization is judged.
        images = np.concatenate([clip.encode_image([np.asarray(one)]) for one in rendered])
        embedded = np.concatenate([clip.encode_text([text]) for text in texts])
    assert reference - recall_at_k(embedded, images, 1) <= _BUDGET
    calibration = captioned("calibration", 64)
    naive = NaiveInt8(
        SHAPES / name,
        tmp_path / "naive",
        [render(scene, 224) for scene, _ in calibration],
        [text for _, text in calibration],
    )
    lost = reference - recall_at_k(naive.texts(texts), naive.images(rendered), 1)
    if name == "clip-outliers":
        assert lost > 0.10
