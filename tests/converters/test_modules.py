"""A user's own module, an ONNX file and a head: converted, quantized, loaded, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import mmedge
from mmedge.bundle import Bundle, open_bundle, verify_files
from mmedge.bundle.kinds import FusedKind, ModuleKind
from mmedge.cli import main
from mmedge.converters import ConvertConfig, HeadSpec, TapInput, convert_module
from mmedge.errors import InputError, SourceError
from mmedge.models.dual_encoder import DualEncoder
from mmedge.models.module import Module
from mmedge.sessions.verification import verify_bundle
from mmedge.specs import Array, Compare, TensorSpec

FLOAT = np.dtype(np.float32)


class Policy(nn.Module):
    """camera features (B, 16) and joints (B, 6) -> action (B, 4) and value (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(22, 64), nn.Linear(64, 5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(
        self, camera: torch.Tensor, joints: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.first(torch.cat([camera, joints], -1)))
        out = self.second(hidden)
        return torch.tanh(out[:, :4]), out[:, 4:]


def save_rows(path: Path, count: int, seed: int, **widths: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    rows = {n: rng.standard_normal((count, w)).astype(np.float32) for n, w in widths.items()}
    np.savez(path, **rows)  # type: ignore[arg-type]
    return rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Policy]:
    folder = tmp_path_factory.mktemp("policy")
    save_rows(folder / "feeds.npz", 80, 1, camera=16, joints=6)
    module = Policy()
    convert_module(
        module,
        ConvertConfig(
            "policy", folder / "p.mmedge", ("fp32", "int8"), calibration=folder / "feeds.npz"
        ),
        inputs=[
            TensorSpec("camera", FLOAT, ("batch", 16)),
            TensorSpec("joints", FLOAT, ("batch", 6)),
        ],
        outputs=[
            TensorSpec("action", FLOAT, ("batch", 4)),
            TensorSpec("value", FLOAT, ("batch", 1)),
        ],
    )
    return folder / "p.mmedge", module


def test_a_module_of_two_inputs_runs_as_in_pytorch(policy: tuple[Path, Policy]) -> None:
    path, module = policy
    rng = np.random.default_rng(5)
    feed = {
        n: rng.standard_normal((3, w)).astype(np.float32)
        for n, w in (("camera", 16), ("joints", 6))
    }
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in feed.values()))
    with Module.load(path, precision="fp32") as model:
        outputs = model(feed)
    for name, value in zip(("action", "value"), expected, strict=True):
        np.testing.assert_allclose(outputs[name], value.numpy(), atol=1e-5)
    with mmedge.load(path, precision="int8-static") as model:
        assert isinstance(model, Module)
        near = model(feed)
        with pytest.raises(InputError, match=r"Unknown input 'camra'.*Did you mean camera"):
            model({"camra": feed["camera"]})
        with pytest.raises(InputError, match="Inputs do not match"):
            model({"camera": feed["camera"]})
    np.testing.assert_allclose(near["action"], expected[0].numpy(), atol=0.15)


def test_the_command_line_runs_a_module_on_arrays(
    policy: tuple[Path, Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = {"camera": np.ones((2, 16), np.float32), "joints": np.zeros((2, 6), np.float32)}
    np.savez(tmp_path / "feed.npz", allow_pickle=False, **feed)
    asked = ["run", policy[0], "--feed", tmp_path / "feed.npz", "-o", tmp_path / "made.npz"]
    with pytest.raises(SystemExit) as done:
        main([str(each) for each in asked])
    assert not done.value.code
    assert "float32" in capsys.readouterr().out
    with mmedge.load(policy[0]) as model, np.load(tmp_path / "made.npz") as made:
        assert isinstance(model, Module)
        for name, array in model(feed).items():
            np.testing.assert_allclose(made[name], array, atol=1e-6)


def test_every_layer_of_a_module_is_quantized_and_judged(policy: tuple[Path, Policy]) -> None:
    bundle = open_bundle(policy[0])
    verify_files(bundle)
    assert all(result.passed for result in verify_bundle(bundle))
    assert isinstance(bundle.manifest.kind, ModuleKind)
    role = bundle.role("module")
    assert [output.compare for output in role.outputs] == [Compare.VALUES] * 2
    for name in ("int8-dynamic", "int8-static"):
        variant = bundle.variant("module", name)
        nodes = bundle.nodes(variant)
        assert nodes is not None
        assert {node.precision for node in nodes.nodes} == {"int8"}
        assert variant.quality is not None
        assert variant.quality.data == "feeds.npz, held back: 16 samples"
        assert variant.quality.figures["value_agreement"].value > 0.9
        assert variant.space is None


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of another exporter: opset 17, two products, an unnamed axis."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.2, name)
        for name, shape in (("w1", (12, 32)), ("w2", (32, 3)))
    ]
    nodes = [
        helper.make_node("MatMul", ["observation", "w1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["action"]),
    ]
    made = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["N", 12])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["N", 3])],
        weights,
    )
    folder = tmp_path_factory.mktemp("onnx")
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    save_rows(folder / "feeds.npz", 60, 2, observation=12)
    return folder


def run(*command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(command))
    assert ended.value.code == 0


def test_an_onnx_file_is_a_source(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = graph / "x.mmedge"
    command = ["convert", str(graph / "model.onnx"), "-o", str(out), "--precision", "fp32,int8"]
    run(*command, "--calibration", str(graph / "feeds.npz"))
    bundle = open_bundle(out)
    assert bundle.manifest.family == "onnx"
    assert bundle.manifest.provenance.source.endswith("model.onnx")
    observation = np.random.default_rng(3).standard_normal((4, 12)).astype(np.float32)
    import onnxruntime

    theirs = onnxruntime.InferenceSession(graph / "model.onnx", providers=["CPUExecutionProvider"])
    (expected,) = theirs.run(None, {"observation": observation})
    for precision, tolerance in (("fp32", 1e-6), ("int8-dynamic", 0.1)):
        with Module.load(out, precision=precision) as model:
            got = model({"observation": observation})["action"]
        np.testing.assert_allclose(got, expected, atol=tolerance)
    capsys.readouterr()
    run("verify", str(out))
    run("inspect", str(out))
    assert "module" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no graph"), "model.onnx"),
        (lambda path: path.unlink(), "No such folder"),
    ],
)
def test_an_onnx_file_that_cannot_be_read(
    damage: object, message: str, graph: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((graph / "model.onnx").read_bytes())
    damage(path)  # type: ignore[operator]
    from mmedge.converters.sources.source import open_source

    with pytest.raises(SourceError, match=message):
        open_source(str(path))


class Fused(nn.Module):
    """Two embeddings (B, 4) -> scores (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text, self.out = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.out(torch.relu(self.image(image)) * torch.relu(self.text(text)))
        return hidden


def convert_fused(folder: Path, on: Path) -> tuple[Path, Fused]:
    module = Fused()
    rows = save_rows(folder / "rows.npz", 100, 4, image=4, text=4)
    with torch.inference_mode():
        labels = module(*(torch.from_numpy(array) for array in rows.values())).argmax(-1).numpy()
    np.savez(folder / "rows.npz", labels=labels, **rows)
    out = folder / "head.mmedge"
    convert_module(
        module,
        ConvertConfig("head", out, ("fp32", "int8"), calibration=folder / "rows.npz"),
        inputs=[TensorSpec(name, FLOAT, ("batch", 4)) for name in ("image", "text")],
        outputs=[TensorSpec("scores", FLOAT, ("batch", 3))],
        head=HeadSpec(
            on=on,
            inputs={name: TapInput(modality=name) for name in ("image", "text")},
            labels=("yes", "no", "unclear"),
        ),
    )
    return out, module


def test_a_head_on_embeddings_is_quantized_and_judged(tmp_path: Path, tiny_bundle: Bundle) -> None:
    path, module = convert_fused(tmp_path, tiny_bundle.path)
    bundle = open_bundle(path)
    assert isinstance(bundle.manifest.kind, FusedKind)
    for name in ("int8-dynamic", "int8-static"):
        quality = bundle.variant("head", name).quality
        assert quality is not None
        assert quality.figures["accuracy"].value > 0.8
        assert quality.drops["accuracy"].value < 0.2
    frame = np.full((9, 12, 3), 90, np.uint8)
    with (
        DualEncoder.load(tiny_bundle.path, precision="fp32") as clip,
        mmedge.load_head(path, on=clip, precision="int8-dynamic") as head,
    ):
        assert head.labels == ("yes", "no", "unclear")
        scores = head(clip.extract(frame), "a red circle").scores
        embedded = clip.encode_image(frame), clip.encode_text("a red circle")
    with torch.inference_mode():
        expected = module(*(torch.from_numpy(array) for array in embedded)).numpy()
    np.testing.assert_allclose(scores, expected, atol=0.3)
