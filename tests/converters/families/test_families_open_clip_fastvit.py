"""MobileCLIP: its tower's branches joined, whichever form a checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from describing import describe
from open_clip_cases import CASES, RECORDED, TEXTS, images, tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from mmedge import DualEncoder
from mmedge.bundle import open_bundle
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.families.open_clip_fastvit import FASTVIT, FastVitArchitecture, _Joined
from mmedge.errors import SourceError
from mmedge.sessions.verification import verify_bundle

RECORD: Mapping[str, Any] = json.loads(RECORDED.read_text("utf-8"))["mobileclip"]
TINY = FastVitArchitecture((1, 2, 1, 1), (8, 16, 32, 64))


@pytest.fixture(autouse=True)
def _tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FASTVIT, "tiny_mci", TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "mobileclip", CASES["mobileclip"], RECORD["shapes"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MobileCLIP in fp32 and int8-dynamic."""
    place = tmp_path_factory.mktemp("mobileclip")
    source = write_checkpoint(place / "source", CASES["mobileclip"], RECORD["shapes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FASTVIT, "tiny_mci", TINY)
        precisions = ("fp32", "int8-dynamic")
        convert(ConvertConfig(str(source), place / "mobileclip.mmedge", precisions=precisions))
    return place / "mobileclip.mmedge"


def test_a_bundle_embeds_as_open_clip_does(bundle: Path) -> None:
    with DualEncoder.load(bundle, precision="fp32") as model:
        np.testing.assert_allclose(model.encode_image(images()), RECORD["image"], atol=2e-5)
        np.testing.assert_allclose(model.encode_text(TEXTS), RECORD["text"], atol=2e-5)


def test_int8_opens_runs_and_is_near(bundle: Path) -> None:
    assert all(result.passed for result in verify_bundle(open_bundle(bundle)))
    with DualEncoder.load(bundle, precision="int8-dynamic") as small:
        near = (small.encode_image(images()) * np.array(RECORD["image"])).sum(axis=1)
        alike = (small.encode_text(TEXTS) * np.array(RECORD["text"])).sum(axis=1)
    assert near.min() > 0.97
    assert alike.min() > 0.97


def test_branches_and_norms_are_joined(bundle: Path) -> None:
    nodes = onnx.load(bundle / "image_encoder" / "fp32.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert "BatchNormalization" not in kinds
    # Three of the stem, two of each later stage, its positions, mixers and MLPs, and the last.
    depthwise_and_dense = 3 + 3 * 2 + 1 + 4 + 5 * 3 + 1
    squeezed = 3 * 2
    assert kinds.count("Conv") <= depthwise_and_dense + squeezed


def test_a_reparameterized_checkpoint_gives_the_same(folder: Path) -> None:
    """As timm's reparameterize leaves it: one convolution for a block's branches."""
    from mmedge.converters.families.open_clip import _outline
    from mmedge.converters.families.open_clip_config import read_model_config
    from mmedge.converters.sources.source import open_source

    spec = describe(folder).spec.roles["image_encoder"]()
    source = open_source(str(folder))
    model = _outline(source, read_model_config(source.fields, len(source.shapes)))
    weights = load_file(folder / "open_clip_model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.endswith("batches_tracked")}
    known = {key: value for key, value in kept.items() if key.startswith("visual.")}
    model.load_state_dict(known, assign=True, strict=False)
    for name, module in model.visual.named_modules():  # type: ignore[union-attr]
        if isinstance(module, _Joined) and ".token_mixer." not in name:  # not a mixer's parts
            own = f"visual.{name}."
            squeeze = {key: value for key, value in kept.items() if key.startswith(f"{own}se.")}
            kernel, bias = module.kernel()
            kept = {key: value for key, value in kept.items() if not key.startswith(own)} | squeeze
            kept[f"{own}reparam_conv.weight"] = kernel.detach().contiguous()
            kept[f"{own}reparam_conv.bias"] = bias.detach().contiguous()
    save_file(kept, folder / "open_clip_model.safetensors")
    joined = describe(folder).spec.roles["image_encoder"]()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert spec.module is not None
    assert joined.module is not None
    with torch.inference_mode():
        torch.testing.assert_close(joined.module(pixels), spec.module(pixels), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "visual.trunk.stem.0.conv_scale.bn.running_var",
            r"conv_scale\.bn\.running_var is missing",
        ),
        ("visual.trunk.stages.3.pos_emb.pos_enc.bias", r"pos_emb\.pos_enc\.bias is missing"),
        ("visual.trunk.head.fc.weight", r"head\.fc\.weight is missing"),
    ],
)
def test_a_missing_tensor_is_named(lost: str, message: str, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in RECORD["shapes"].items() if name != lost}
    folder = write_checkpoint(tmp_path / "lost", CASES["mobileclip"], shapes)
    with pytest.raises(SourceError, match=message):
        describe(folder)


def test_drawn_variances_are_positive() -> None:
    drawn = tensors(RECORD["shapes"])
    assert min(v.min() for name, v in drawn.items() if name.endswith("running_var")) > 0
