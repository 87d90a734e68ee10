"""The file that a probe writes beside a model: gone when it is not needed, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from towers import continued, decoder_tower, image_tower, images

from mmedge.converters.graphs.probe import ProbeBuilder, open_probe
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import quantizable_inputs
from mmedge.errors import StorageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


def largest(build: ProbeBuilder, _: str, value: ir.Value) -> dict[str, ir.Value]:
    return {"high": build.node("ReduceMax", [value], {"keepdims": 0})}


def files(model: Path) -> list[str]:
    return sorted(path.name for path in model.parent.iterdir())


def test_the_file_is_gone_as_soon_as_the_engine_has_read_it(model: Path) -> None:
    before = files(model)
    original = model.read_bytes()
    feed = images(2)
    with open_probe(model, ["pixel_values"], largest) as probe:
        assert files(model) == before
        got = probe.run(feed)
    assert got["pixel_values"]["high"] == feed["pixel_values"].max()
    assert files(model) == before
    assert model.read_bytes() == original


def test_a_decoder_is_measured_in_every_layout_from_an_empty_past_on(tmp_path: Path) -> None:
    portable, layout = decoder_tower(tmp_path / "fp32.onnx"), tmp_path / "fp32.ort.onnx"
    to_onnxruntime_layout(portable, layout)
    names = quantizable_inputs(ir.load(portable))
    assert len(names) == 9
    for past in (0, 3):
        found = []
        for path in (portable, layout):
            with open_probe(path, names, largest) as probe:
                values = probe.run(continued(2, 4, past))
            found.append([float(values[name]["high"]) for name in names])
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_two_probes_of_one_model_do_not_meet(model: Path) -> None:
    feed = images(1)
    with (
        open_probe(model, ["pixel_values"], largest) as first,
        open_probe(model, ["pixel_values"], largest) as second,
    ):
        np.testing.assert_equal(first.run(feed), second.run(feed))


_HANG = """
import sys, time
from pathlib import Path
import mmedge.converters.graphs.probe as probing
def hang(path):
    print("written", flush=True)
    time.sleep(60)
probing.open_graph = hang
with probing.open_probe(Path(sys.argv[1]), [], lambda *_: {}):
    pass
"""


def test_leftovers_of_a_kill_are_removed_unless_in_use(model: Path) -> None:
    before = files(model)
    with subprocess.Popen([sys.executable, "-c", _HANG, model], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        held = sorted(set(files(model)) - set(before))
        assert len(held) == 1
        with open_probe(model, ["pixel_values"], largest):
            assert files(model) == sorted([*before, *held])
        process.send_signal(signal.SIGKILL)
    assert files(model) == sorted([*before, *held])
    with open_probe(model, ["pixel_values"], largest):
        assert files(model) == before


def test_a_folder_that_cannot_be_written_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmedge.converters.graphs.probe.ir.save", refuse)
    before = files(model)
    with (
        pytest.raises(StorageError, match="the disk is full"),
        open_probe(model, ["pixel_values"], largest),
    ):
        pass
    assert files(model) == before
