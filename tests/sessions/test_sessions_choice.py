"""Which backend is taken, when it is measured, and how that is remembered."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import edit_manifest, golden_vectors

import mmedge
from mmedge.bundle import Bundle, Golden, open_bundle, save_golden
from mmedge.errors import BackendError, BackendUnavailableError, InputError, IntegrityError
from mmedge.files.cache_folder import cache_folder
from mmedge.models import verify_bundle
from mmedge.runtimes.backends import backend
from mmedge.runtimes.ort import engine as ort_engine
from mmedge.runtimes.selection import remembered as choices
from mmedge.runtimes.selection.interleaved import InterleavedTiming
from mmedge.runtimes.selection.remembered import Choice, recall_choice, remember_choice
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.sessions import choice as choosing
from mmedge.sessions.choice import candidates, leading_backend
from mmedge.sessions.opening import session_options
from mmedge.specs import Axis

ORT, OPENVINO, RTX = "onnxruntime", "openvino", "tensorrt-rtx"
ort, openvino, rtx = backend(ORT), backend(OPENVINO), backend(RTX)


class Races:
    """Replaces time_interleaved(): every call runs once, with a set result."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.contestants: list[list[str]] = []

    def __call__(self, calls: Mapping[str, Callable[[], Any]], **_: object) -> dict[str, Any]:
        self.contestants.append(list(calls))
        for call in calls.values():
            (output,) = call().values()
            assert len(output) == 1  # one golden input
        return {
            name: InterleavedTiming(10 * ratio, 10 * ratio, ratio, ratio, ratio, (10 * ratio,))
            for name, ratio in zip(calls, (1.0, self.ratio), strict=False)
        }


@pytest.fixture
def races(several_backends: Path, monkeypatch: pytest.MonkeyPatch) -> Races:
    """OpenVINO takes half the time by default."""
    made = Races(0.5)
    monkeypatch.setattr(choosing, "time_interleaved", made)
    return made


def running(bundle: Bundle, **arguments: Any) -> dict[str, str]:
    with mmedge.load(bundle.path, **arguments) as model:
        backends = {role: s.placement.backend for role, s in model.sessions.items()}
        assert {role: choice.backend for role, choice in model.choices.items()} == backends
    return backends


def both(backend: str) -> dict[str, str]:
    return {"image_encoder": backend, "text_encoder": backend}


def test_the_fastest_is_measured_once_and_remembered(tiny_bundle: Bundle, races: Races) -> None:
    assert running(tiny_bundle) == both(OPENVINO)
    assert races.contestants == [[ORT, OPENVINO]] * 2  # once a role
    assert running(tiny_bundle) == both(OPENVINO)
    assert len(races.contestants) == 2


def test_a_choice_has_its_reason_and_measurements(tiny_bundle: Bundle, races: Races) -> None:
    expected = Choice(
        OPENVINO, "measured: 50% less time than onnxruntime", {ORT: 10.0, OPENVINO: 5.0}
    )
    for _ in range(2):  # measured, then remembered
        with mmedge.load(tiny_bundle.path, roles=["text_encoder"]) as model:
            assert model.choices == {"text_encoder": expected}


@pytest.mark.parametrize(("ratio", "taken"), [(0.96, OPENVINO), (0.98, ORT), (1.0, ORT), (2, ORT)])
def test_onnx_runtime_keeps_its_place_unless_clearly_beaten(
    ratio: float, taken: str, tiny_bundle: Bundle, races: Races
) -> None:
    races.ratio = ratio
    assert running(tiny_bundle) == both(taken)
    assert running(tiny_bundle) == both(taken)
    assert len(races.contestants) == 2


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_measuring_can_be_forbidden(
    how: str,
    tiny_bundle: Bundle,
    races: Races,
    several_backends: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = {"measure": False} if how == "argument" else {}
    if how == "environment":
        monkeypatch.setenv("MMEDGE_MEASURE", "0")
    assert running(tiny_bundle, **arguments) == both(ORT)
    assert races.contestants == []
    assert not list(several_backends.rglob("*.json"))
    assert running(tiny_bundle, roles=["image_encoder"], measure=True) == {
        "image_encoder": OPENVINO
    }
    # What is cached is taken, the other role is not measured.
    assert running(tiny_bundle, **arguments) == {"image_encoder": OPENVINO, "text_encoder": ORT}
    assert len(races.contestants) == 1


def test_the_variable_that_forbids_measuring_is_checked(
    tiny_bundle: Bundle, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEDGE_MEASURE", "no")
    with pytest.raises(InputError, match="MMEDGE_MEASURE: got 'no', expected 0"):
        mmedge.load(tiny_bundle.path)
    assert running(tiny_bundle, backend=ORT) == both(ORT)
    assert running(tiny_bundle, measure=False) == both(ORT)


def test_roles_may_differ(tiny_bundle: Bundle, races: Races) -> None:
    assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}
    races.ratio = 2
    assert running(tiny_bundle) == {"image_encoder": OPENVINO, "text_encoder": ORT}


@pytest.mark.parametrize("backend", [ORT, OPENVINO, "fake"])
def test_a_backend_that_is_named_is_what_runs(
    backend: str, tiny_bundle: Bundle, races: Races, several_backends: Path
) -> None:
    assert running(tiny_bundle, backend=backend) == both(backend)
    assert races.contestants == []
    assert not list(several_backends.rglob("*.json"))


def test_one_backend_alone_is_taken_without_measuring(
    tiny_bundle: Bundle, races: Races, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "engine_version", lambda: None)
    assert running(tiny_bundle) == both(OPENVINO)
    assert races.contestants == []
    assert not list(several_backends.rglob("*.json"))


def test_without_any_backend_the_error_names_the_package(
    tiny_bundle: Bundle, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (ort, openvino):
        monkeypatch.setattr(each, "engine_version", lambda: None)
    monkeypatch.setattr(rtx, "available_devices", tuple)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ort_engine.load_engine.cache_clear()
    with pytest.raises(BackendUnavailableError, match="Install one build"):
        mmedge.load(tiny_bundle.path)


def test_a_variant_in_one_layout_alone_goes_where_it_can(tiny_bundle: Bundle) -> None:
    variant = tiny_bundle.variant("image_encoder")
    own = variant.model_copy(update={"models": {"onnxruntime": variant.models["portable"]}})
    assert candidates(own, "cpu") == (ORT,)


def test_candidates_by_device(
    tiny_bundle: Bundle, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "engine_version", lambda: "1.7.1")
    variant = tiny_bundle.variant("image_encoder")
    assert candidates(variant, "cpu") == (ORT, OPENVINO)
    assert candidates(variant, "cuda") == (ORT, RTX)
    own = variant.model_copy(update={"models": {"onnxruntime": variant.models["portable"]}})
    assert candidates(own, "cuda") == (ORT,)


class Engines:
    """Replaces TensorRT: its engine exists or not, and sessions run in the fake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepared = True
        self.asked: list[SessionOptions] = []
        for name, value in (
            ("engine_version", lambda: "1.7.1"),
            ("available_devices", lambda: ("cuda",)),
            ("is_prepared", self.is_prepared),
            ("open_session", self.open_session),
        ):
            monkeypatch.setattr(rtx, name, value)

    def is_prepared(self, model: Path, options: SessionOptions) -> bool:
        assert model.is_file()
        self.asked.append(options)
        return self.prepared

    def open_session(self, model: Path, options: SessionOptions) -> Any:
        session = ort.open_session(model, SessionOptions(threads=1))
        session._placement = Placement(RTX, options.device, "tensorrt-rtx 1.7.1")
        return session


def test_an_engine_that_is_there_is_in_the_race(
    tiny_bundle: Bundle, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines(monkeypatch)

    # This ONNX Runtime has no CUDA, so of the two that are tried the engine is left.
    assert running(tiny_bundle, device="gpu", roles=["image_encoder"]) == {"image_encoder": RTX}
    (asked,) = engines.asked
    assert asked.device == "cuda"
    assert asked.axes == {"batch": Axis(1, 1, 8)}


def test_an_engine_that_would_have_to_be_built_is_not(
    tiny_bundle: Bundle,
    several_backends: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines = Engines(monkeypatch)
    engines.prepared = False
    caplog.set_level(logging.INFO, "mmedge.engines")

    with pytest.raises(BackendUnavailableError, match=r"without CUDA.*Or tensorrt-rtx .*build"):
        mmedge.load(tiny_bundle.path, device="cuda")
    assert "tensorrt-rtx can run it once its engine is built" in caplog.text
    with monkeypatch.context() as there_is:
        there_is.setattr(rtx, "available_devices", tuple)  # no GPU for an engine
        with pytest.raises(BackendUnavailableError, match="without CUDA") as caught:
            mmedge.load(tiny_bundle.path, device="cuda")
        assert "tensorrt-rtx" not in str(caught.value)
    assert running(tiny_bundle, device="cuda", backend=RTX) == both(RTX)  # named, it builds


def test_engines_lead_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (ort, openvino):
        monkeypatch.setattr(each, "engine_version", lambda: None)
    monkeypatch.setattr(rtx, "engine_version", lambda: "1.7.1")
    monkeypatch.setattr(rtx, "available_devices", tuple)
    assert leading_backend() == ORT
    monkeypatch.setattr(rtx, "available_devices", lambda: ("cuda",))
    assert leading_backend() == RTX


@pytest.mark.parametrize(
    ("word", "device"),
    [("gpu", "cuda"), ("gpu:1", "cuda:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("gpus", "gpus")],
)
def test_gpu_is_another_word_for_cuda(word: str, device: str) -> None:
    assert session_options(ORT, word, None).device == device
    assert session_options(ORT, None, SessionOptions(device=word)).device == device


def spoil(bundle: Bundle, *backends: str) -> Any:
    """Make the sessions of some backends return other outputs."""
    replay = choosing.replay

    def spoilt(session: Any, golden: Golden, *arguments: Any) -> Any:
        if session.placement.backend in backends:
            inputs = {
                role: {name: array[::-1].copy() for name, array in arrays.items()}
                for role, arrays in golden.inputs.items()
            }
            golden = Golden(inputs, golden.outputs)
        return replay(session, golden, *arguments)

    return spoilt


def test_a_backend_that_disagrees_with_the_golden_vectors_is_excluded(
    tiny_bundle: Bundle, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "replay", spoil(tiny_bundle, OPENVINO))
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"]) as model:
        choice = model.choices["image_encoder"]
    assert choice.backend == ORT
    assert "openvino: out of tolerance on the golden vectors, cosine" in choice.reason
    assert races.contestants == []


def test_where_none_agrees_there_is_a_warning_and_nothing_is_remembered(
    tiny_bundle: Bundle, races: Races, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "replay", spoil(tiny_bundle, ORT, OPENVINO))
    with pytest.warns(RuntimeWarning, match=r"text_encoder/fp32: no backend agrees.*mmedge verify"):
        assert running(tiny_bundle, roles=["text_encoder"]) == {"text_encoder": ORT}
    assert not list(several_backends.rglob("*.json"))


def test_a_backend_that_refuses_is_out(tiny_bundle: Bundle, races: Races) -> None:
    options = SessionOptions(prepack=False)  # which OpenVINO has not
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"], options=options) as model:
        choice = model.choices["image_encoder"]
        assert "openvino: The openvino backend has no option prepack" in choice.reason
        assert choice.backend == model.sessions["image_encoder"].placement.backend == ORT
    assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}


def test_where_every_backend_refuses_the_first_reason_is_raised(
    tiny_bundle: Bundle, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, backend_name: str, **__: object) -> None:
        raise BackendError(f"{backend_name} is tired")

    monkeypatch.setattr(choosing, "open_variant", refuse)
    with pytest.raises(BackendError, match="onnxruntime is tired"):
        mmedge.load(tiny_bundle.path)


def test_damaged_golden_vectors_cannot_measure(tiny_bundle: Bundle, races: Races) -> None:
    save_golden(tiny_bundle.file("golden.npz"), Golden({}, golden_vectors().outputs))
    edit_manifest(
        tiny_bundle.path,
        *("files", "golden.npz", "size_bytes"),
        value=tiny_bundle.file("golden.npz").stat().st_size,
    )
    with pytest.raises(IntegrityError, match="golden"):
        mmedge.load(tiny_bundle.path)


def test_the_losers_are_closed(
    tiny_bundle: Bundle, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def note(*arguments: Any, **named: Any) -> Any:
        opened.append(open_variant(*arguments, **named))
        return opened[-1]

    open_variant = choosing.open_variant
    monkeypatch.setattr(choosing, "open_variant", note)
    feed = {"pixel_values": golden_vectors().inputs["image_encoder"]["pixel_values"]}
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"]):
        assert [session.placement.backend for session in opened] == [ORT, OPENVINO]
        opened[1].run(feed)
        with pytest.raises(BackendError, match="closed"):
            opened[0].run(feed)


def test_threads_that_load_at_once_measure_once(tiny_bundle: Bundle, races: Races) -> None:
    def work() -> None:
        assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(races.contestants) == 1


def test_both_backends_really_race(tiny_bundle: Bundle, several_backends: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"]) as model:
        choice = model.choices["image_encoder"]
        got = model.encode_image(frame)
    assert set(choice.latencies_ms) == {ORT, OPENVINO}
    assert choice.reason.startswith("measured")
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"], backend=ORT) as model:
        np.testing.assert_allclose(got, model.encode_image(frame), atol=1e-5)


# The memory

HASHES = ("b" * 64, "a" * 64)
CHOICE = Choice(OPENVINO, "measured: faster", {ORT: 2.0, OPENVINO: 1.0})


def only_file(folder: Path) -> Path:
    (file,) = (folder / "backends").iterdir()
    return file


def test_a_choice_is_found_again_in_any_order_of_the_files(several_backends: Path) -> None:
    options = SessionOptions(threads=1)
    assert recall_choice(HASHES, options) is None
    remember_choice(HASHES, options, CHOICE)
    assert recall_choice(HASHES[::-1], options) == CHOICE
    document = json.loads(only_file(several_backends).read_text("utf-8"))
    assert document["backend"] == OPENVINO
    assert document["for"]["engines"].keys() == {ORT, OPENVINO}


@pytest.mark.parametrize(
    "change",
    ["files", "threads", "device", "option", "processor", "processors", "engine", "gone engine"],
)
def test_a_choice_depends_on_all_of_its_inputs(
    change: str, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_choice(HASHES, SessionOptions(), CHOICE)
    hashes, options = HASHES, SessionOptions()
    if change == "files":
        hashes = ("c" * 64, "a" * 64)
    elif change == "processor":
        monkeypatch.setattr(choices, "processor_name", lambda: "another")
    elif change == "processors":
        monkeypatch.setattr(choices, "allowed_processors", lambda: tuple(range(99)))
    elif change == "engine":
        monkeypatch.setattr(ort, "engine_version", lambda: "onnxruntime 99")
    elif change == "gone engine":
        monkeypatch.setattr(ort, "engine_version", lambda: None)
    else:
        changed: dict[str, Any] = {"threads": 7} if change == "threads" else {"spin": False}
        options = SessionOptions(**({"device": "cuda"} if change == "device" else changed))
    assert recall_choice(hashes, options) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"format": 2, "backend": "openvino", "reason": "", "latencies_ms": {}}',
        b'{"format": 1, "backend": "evil", "reason": "", "latencies_ms": {}}',
        b'{"format": 1, "backend": ["openvino"], "reason": "", "latencies_ms": {}}',
        b'{"format": 1, "backend": "openvino", "reason": 3, "latencies_ms": {}}',
        b'{"format": 1, "backend": "openvino", "reason": "", "latencies_ms": [1]}',
        b'{"format": 1, "backend": "openvino", "reason": "", "latencies_ms": {"a": NaN}}',
        b'{"format": 1, "backend": "openvino", "reason": "", "latencies_ms": {"a": %s}}'
        % (b"9" * 400),
        b'{"format": 1, "backend": "fake", "reason": "", "latencies_ms": {}}',
    ],
)
def test_a_damaged_memory_is_measured_anew(
    content: bytes, tiny_bundle: Bundle, races: Races, several_backends: Path
) -> None:
    assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}
    file = only_file(several_backends)
    whole = file.read_bytes()
    file.write_bytes(content)
    assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}
    assert len(races.contestants) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("obstacle", ["file", "folder"])
def test_a_memory_that_cannot_be_written_is_a_warning(
    obstacle: str, tiny_bundle: Bundle, races: Races, several_backends: Path
) -> None:
    if obstacle == "file":
        several_backends.write_text("in the way")
    else:
        assert running(tiny_bundle, roles=["image_encoder"])
        file = only_file(several_backends)
        file.unlink()
        file.mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be remembered.*MMEDGE_CACHE_DIR"):
        assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDGE_CACHE_DIR", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("MMEDGE_CACHE_DIR")
    assert cache_folder() == Path("/shared/mmedge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/robot")
    assert cache_folder() == Path("/home/robot/.cache/mmedge")


def test_a_choice_measured_elsewhere_is_taken(tiny_bundle: Bundle, races: Races) -> None:
    """As the converter's search does, which measures by itself."""
    variant = tiny_bundle.variant("image_encoder")
    hashes = [tiny_bundle.manifest.files[path].sha256 for path in variant.files]
    remember_choice(hashes, SessionOptions(device="cpu"), CHOICE)
    assert running(tiny_bundle, roles=["image_encoder"]) == {"image_encoder": OPENVINO}
    assert races.contestants == []


def test_onnx_runtime_remembered_leaves_openvino_unloaded(
    tiny_bundle: Bundle, races: Races
) -> None:
    races.ratio = 2
    running(tiny_bundle)
    code = (
        "import sys, mmedge\n"
        "model = mmedge.load(sys.argv[1])\n"
        "print([c.backend for c in model.choices.values()], 'openvino' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tiny_bundle.path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == f"{[ORT, ORT]} False"


# verify


def test_verify_replays_in_the_backend_that_is_named(tiny_bundle: Bundle) -> None:
    results = verify_bundle(tiny_bundle, backend=OPENVINO)
    assert len(results) == 4
    assert all(result.passed for result in results)
    assert {result.placement.backend for result in results} == {OPENVINO}


def test_verify_skips_variants_without_a_layout_for_the_backend(tiny_bundle: Bundle) -> None:
    for role in ("image_encoder", "text_encoder"):
        model = tiny_bundle.variant(role, "int8").models["portable"]
        steps = ("roles", role, "variants", 1, "models")
        edit_manifest(tiny_bundle.path, *steps, value={"onnxruntime": model})
    bundle = open_bundle(tiny_bundle.path)
    assert [result.variant for result in verify_bundle(bundle, backend=OPENVINO)] == ["fp32"] * 2
    with pytest.raises(InputError, match=r"'int8-dynamic' has no model in \['portable'\]"):
        verify_bundle(bundle, backend=OPENVINO, precision="int8")
