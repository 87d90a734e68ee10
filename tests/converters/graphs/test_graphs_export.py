from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from roles import role
from torch import nn

from mmedge.bundle.quality import Parity
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import OPSET, export_role
from mmedge.converters.graphs.parity import measure_parity, probe_role, require_parity
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.passes.linears import COMPARE_KEY
from mmedge.converters.quiet import quiet_libraries
from mmedge.errors import ExportError, ParityError, StorageError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Axis, Compare, TensorSpec


class Scale(nn.Module):
    """x (B, 4) -> x @ w, with a weight large enough to lie outside the graph."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 300, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 4) * 2


def spec_of(module: nn.Module, width: int = 300) -> RoleSpec:
    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(sizes["batch"], 4, generator=generator)}

    return role(
        module,
        (TensorSpec("x", np.dtype("float32"), ("batch", 4)),),
        (TensorSpec("y", np.dtype("float32"), ("batch", width)),),
        sample,
    )


def export(role: str, spec: RoleSpec, out: Path) -> None:
    with quiet_libraries():
        export_role(role, spec, out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "fp32.onnx"
    export("scale", spec_of(Scale()), out)
    return out


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


def test_weights_lie_beside_the_graph_and_nothing_local_in_it(exported: Path) -> None:
    assert sorted(path.name for path in exported.parent.iterdir()) == [
        "fp32.onnx",
        "fp32.onnx.data",
    ]
    assert (exported.parent / "fp32.onnx.data").stat().st_size == 4 * 300 * 4
    content = exported.read_bytes()
    for local in (str(Path.cwd()), str(Path(__file__)), "forward", os.sep + "site-packages"):
        assert local.encode() not in content
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_parity_holds_at_other_sizes(exported: Path, worker: Worker) -> None:
    spec = spec_of(Scale())
    probes = probe_role(spec)
    assert [len(probe.feed["x"]) for probe in probes] == [2, 1, 3]
    with worker.open(exported, "scale") as graph:
        parity = measure_parity("scale", graph, spec, probes)
    assert parity.samples == 6
    assert parity.max_abs_error < 1e-5
    assert parity.cosine_min > 1 - 1e-9
    require_parity("scale", parity)


def test_other_weights_break_parity_with_figures(exported: Path, worker: Worker) -> None:
    other = Scale()
    with torch.no_grad():
        other.weight += 0.3
    with worker.open(exported, "scale") as graph:
        parity = measure_parity("scale", graph, spec_of(other), probe_role(spec_of(other)))
    assert parity.cosine_min < 0.999
    with pytest.raises(ParityError, match=rf"scale: .*cosine {parity.cosine_min:.6f}"):
        require_parity("scale", parity)
    close = Parity(max_abs_error=0.1, cosine_mean=1, cosine_min=1, samples=1)
    with pytest.raises(ParityError, match=r"largest error 1\.00e-01"):
        require_parity("scale", close)


def test_an_output_of_another_shape_breaks_parity(exported: Path, worker: Worker) -> None:
    spec = spec_of(Scale())
    probe = probe_role(spec)[0]
    short = replace(probe, expected={"y": probe.expected["y"][:1]})
    with worker.open(exported, "scale") as graph, pytest.raises(ParityError, match="frozen"):
        measure_parity("scale", graph, spec, [short])


def test_an_output_that_is_not_finite_breaks_parity(exported: Path, worker: Worker) -> None:
    spec = spec_of(Scale())
    probe = probe_role(spec)[0]
    bad = {"x": np.full_like(probe.feed["x"], np.inf)}
    nan = pytest.raises(ParityError, match="scale/fp16: output 'y' is NaN or infinite")
    with worker.open(exported, "scale/fp16") as graph, nan:
        measure_parity("scale/fp16", graph, spec, [replace(probe, feed=bad)])


def test_a_frozen_axis_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^frozen: "):
        export("frozen", spec_of(Frozen(), 4), tmp_path / "fp32.onnx")
    assert not any(tmp_path.iterdir())


def test_an_output_of_another_width_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"exported outputs are .*300.*expected .*299"):
        export("scale", spec_of(Scale(), 299), tmp_path / "fp32.onnx")


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import onnx_ir

    def save(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", save)
    with pytest.raises(StorageError, match="disk is full"):
        export("scale", spec_of(Scale()), tmp_path / "fp32.onnx")


class Joined(nn.Module):
    """x and all that was seen before, two layers of it, where the mask is not 0."""

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        torch._check(mask.shape[1] == past[0].shape[1] + x.shape[1])
        present = [torch.cat([one, x * scale], 1) for scale, one in enumerate(past, start=1)]
        return (sum(present) * mask[:, :, None], *present)


def test_axes_that_are_sums_keep_their_names(tmp_path: Path) -> None:
    float32, names = np.dtype("float32"), ("first", "second")
    total = ("batch", "past + sequence", 4)
    spec = role(
        module=Joined(),
        inputs=(
            TensorSpec("x", float32, ("batch", "sequence", 4)),
            TensorSpec("mask", float32, total[:2]),
            *(TensorSpec(f"past.{name}", float32, ("batch", "past", 4)) for name in names),
        ),
        outputs=(
            TensorSpec("y", float32, total),
            *(TensorSpec(f"present.{name}", float32, ("batch", "past + sequence", 4))
              for name in names),
        ),
        sample=lambda sizes, seed: {
            "x": torch.full((sizes["batch"], sizes["sequence"], 4), float(seed)),
            "mask": torch.ones(sizes["batch"], sizes["past"] + sizes["sequence"]),
            **{f"past.{name}": torch.ones(sizes["batch"], sizes["past"], 4) for name in names},
        },
        trace_sizes={"batch": 2, "sequence": 3, "past": 5},
        proof_sizes=(),
        axes={"batch": Axis(1, 1, 4), "past": Axis(0, 8, 63), "sequence": Axis(1, 1, 64)},
        compare={"y": Compare.VALUES, "present.first": Compare.NONE},
    )  # fmt: skip
    export("joined", spec, tmp_path / "joined.onnx")
    with open_session(tmp_path / "joined.onnx") as session:
        assert session.inputs == spec.inputs
        assert session.outputs == spec.outputs
    marks = [
        {prop.key: prop.value for prop in output.metadata_props}
        for output in onnx.load(tmp_path / "joined.onnx").graph.output
    ]
    assert marks == [{COMPARE_KEY: "values"}, {COMPARE_KEY: "none"}, {COMPARE_KEY: "none"}]
    frozen = replace(spec, outputs=(TensorSpec("y", float32, ("batch", "past", 4)),
                                    *spec.outputs[1:]))  # fmt: skip
    with pytest.raises(ExportError, match=r"past \+ sequence.*expected"):
        export("joined", frozen, tmp_path / "frozen.onnx")
