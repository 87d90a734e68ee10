"""Bundles for exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import edit_manifest
from onnx import TensorProto, helper, numpy_helper

from mmedge.bundle import Bundle, describe_files, open_bundle

MODEL = "image_encoder/fp32.onnx"


def _described_again(path: Path, own: list[str]) -> Bundle:
    """Open a bundle whose image_encoder/fp32 has become other files."""
    files = describe_files(path)
    described = {name: entry.model_dump(mode="json") for name, entry in files.items()}
    edit_manifest(path, "files", value=described)
    steps = ("roles", "image_encoder", "variants", 0)
    edit_manifest(path, *steps, "files", value=own)
    total = sum(files[name].size_bytes for name in own)
    edit_manifest(path, *steps, "size_bytes", value=total)
    return open_bundle(path)


@pytest.fixture
def bundle_with_data(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle, weights of image_encoder/fp32 in a file of their own."""
    path = tiny_bundle.path / MODEL
    data = f"{path.name}.data"
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location=data, size_threshold=0
    )
    return _described_again(tiny_bundle.path, [MODEL, f"{MODEL}.data"])


@pytest.fixture
def bundle_with_half(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle, weights of image_encoder/fp32 in float16."""
    path = tiny_bundle.path / MODEL
    model = onnx.load(path)
    weights = model.graph.initializer[0]
    half = numpy_helper.from_array(numpy_helper.to_array(weights).astype(np.float16), "half")
    cast = helper.make_node("Cast", ["half"], [weights.name], to=TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    model.graph.initializer[0].CopyFrom(half)
    onnx.save_model(model, path)
    return _described_again(tiny_bundle.path, [MODEL])
