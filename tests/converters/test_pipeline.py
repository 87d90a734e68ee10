"""From source to bundle, with tiny models of random weights."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import PROCESSORS, tokenizer_json
from converted import write_images
from models.tiny_models import write_clip
from roles import role as role_of

import mmedge
import mmedge.converters.variants.builder
from mmedge.bundle import Bundle, Manifest, load_golden, open_bundle, verify_files
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.config import ConvertConfig, recipes
from mmedge.converters.data.checks import Data, plan_role
from mmedge.converters.data.datasets import read_dataset
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.embedding import Retrieval
from mmedge.converters.evaluation.embedding_figures import interchangeable
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.progress import ProgressEvent
from mmedge.converters.provenance import describe_provenance
from mmedge.converters.report import ConversionReport
from mmedge.converters.request import convert
from mmedge.converters.sources.source import Source
from mmedge.errors import (
    BundleError,
    CalibrationError,
    ConversionError,
    ParityError,
    SourceError,
    StorageError,
)
from mmedge.preprocess import TextProcessor
from mmedge.preprocess.config import TextConfig
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes.backends import open_session
from mmedge.specs import Precision, TensorSpec

PRECISIONS = ("fp32", "fp16", "int8")


def kind_of(manifest: Manifest) -> DualEncoderKind:
    assert isinstance(manifest.kind, DualEncoderKind)
    return manifest.kind


@pytest.fixture(scope="module")
def full(
    tmp_path_factory: pytest.TempPathFactory,
    clip_folder: Path,
    photo_folder: Path,
    evaluation_folder: Path,
) -> tuple[ConversionReport, Bundle, list[ProgressEvent]]:
    """A CLIP in every precision, calibrated and evaluated."""
    events: list[ProgressEvent] = []
    config = ConvertConfig(
        source=str(clip_folder),
        out=tmp_path_factory.mktemp("bundles") / "clip.mmedge",
        precisions=PRECISIONS,
        calibration=photo_folder,
        evaluate=evaluation_folder,
    )
    report = convert(config, events.append)
    return report, open_bundle(config.out), events


@pytest.fixture(scope="module")
def siglip(
    tmp_path_factory: pytest.TempPathFactory, siglip_folder: Path, photo_folder: Path
) -> Bundle:
    """A SigLIP in int8 alone, with nothing to evaluate on."""
    out = tmp_path_factory.mktemp("bundles") / "siglip.mmedge"
    convert(ConvertConfig(str(siglip_folder), out, ("int8",), calibration=photo_folder))
    return open_bundle(out)


def test_a_bundle_holds_every_variant_best_first(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    _, bundle, _ = full
    verify_files(bundle)
    manifest = bundle.manifest
    assert (manifest.family, kind_of(manifest).embedding_dim) == ("clip", 16)
    head = kind_of(manifest).contrastive_head
    assert head is not None
    assert head.logit_scale == pytest.approx(np.exp(2.6592), rel=1e-4)
    for role in manifest.roles.values():
        names = [variant.name for variant in role.variants]
        assert names[:2] == ["fp32", "fp16"]
        assert set(names[2:]) == {"int8-dynamic", "int8-static"}
        cosines = [v.quality.value("cosine_mean") for v in role.variants if v.quality is not None]
        assert cosines == sorted(cosines, reverse=True)
        fp32 = role.variants[0]
        assert set(fp32.models) == {"portable", "onnxruntime"}
        assert fp32.opset == 20
        for variant in role.variants:
            if variant.precision is Precision.INT8:
                assert variant.size_bytes < fp32.size_bytes
        models = {variant.name: set(variant.models) for variant in role.variants}
        assert models["fp16"] == {"portable"}
        assert models["int8-dynamic"] == {"onnxruntime"}
        assert models["int8-static"] == {"portable", "onnxruntime"}


def test_both_layouts_of_fp32_share_their_weights(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    fp32 = full[1].manifest.roles["text_encoder"].variants[0]
    assert sorted(fp32.files) == [
        "text_encoder/fp32.onnx",
        "text_encoder/fp32.onnx.data",
        "text_encoder/fp32.onnxruntime.onnx",
    ]


def test_an_embedding_does_not_depend_on_the_texts_beside_it(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    texts = ["a b c d e f g h i"[:length] for length in (1, 9, 3, 17, 5, 11, 1, 15)]
    options = mmedge.SessionOptions(threads=1)
    path = full[1].path
    with mmedge.load(path, precision="fp32", backend="onnxruntime", options=options) as model:
        processor = model.text_processor
        ids = processor.tokenize(texts)
        assert len({len(tokens) for tokens in ids}) > 4
        alone = np.concatenate([model.encode_text(text) for text in texts])
        for batch_size in (1, 3, 32):
            together = model.encode_text(texts, batch_size=batch_size)
            np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    # Padding all to the longest, which encode_text avoids, changes nothing but the time.
    variant = full[1].variant("text_encoder", "fp32")
    with open_session(full[1].model_path(variant, layouts=("onnxruntime",))) as session:
        padded = session.run(processor.pad(ids))["embedding"]
    np.testing.assert_allclose(padded, alone, rtol=0, atol=1e-6)
    assert np.ptp(alone, axis=0).max() > 0.01  # the texts do differ


def test_static_int8_is_operators_here_and_qdq_for_others_with_the_weights_once(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    bundle = full[1]
    static = bundle.variant("image_encoder", "int8-static")
    assert sorted(static.files) == [
        "image_encoder/int8-static.onnx",
        "image_encoder/int8-static.onnx.data",
        "image_encoder/int8-static.portable.onnx",
    ]
    operators = {
        layout: {node.op_type for node in onnx.load(bundle.file(path)).graph.node}
        for layout, path in static.models.items()
    }
    assert "MatMulIntegerToFloat" in operators["onnxruntime"]
    assert {"QuantizeLinear", "DequantizeLinear", "MatMul"} < operators["portable"]
    assert {
        node.domain for node in onnx.load(bundle.file(static.models["portable"])).graph.node
    } == {""}
    assert static.recipe == {
        "method": "StaticInt8",
        "form": "operators, qdq (portable)",
        "activations": "uint8",
        "ranges": "minmax",
        "bias_correction": False,
        "equalization": None,
        "keep": [],
        "paired": False,
        "rest": "float32",
    }


def test_figures_are_of_the_held_out_data(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    for name, role in full[1].manifest.roles.items():
        for variant in role.variants:
            assert variant.parity is not None
            assert variant.quality is not None
            assert variant.quality.data.startswith("held-out: 24 ")
            assert variant.quality.samples == 24
            assert (
                {
                    "text_to_image_recall@1",
                    "image_to_text_recall@5",
                    "zero_shot_accuracy",
                }
                < set(variant.quality.drops)
                < set(variant.quality.figures)
            )
            if variant.precision is Precision.FP32:
                assert variant.parity.cosine_min > 0.99999, name
                assert variant.quality.value("cosine_min") == pytest.approx(1)
                assert {drop.value for drop in variant.quality.drops.values()} == {0}


def test_variants_that_are_interchangeable_share_a_space(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    manifest = full[1].manifest
    base = manifest.roles["image_encoder"].variants[0].space
    assert base is not None
    assert re.fullmatch(r"clip-[0-9a-f]{32}", base)
    for role in manifest.roles.values():
        for variant in role.variants:
            assert variant.quality is not None
            alike = interchangeable(variant.quality)
            assert alike or variant.precision is Precision.INT8
            assert variant.space == (base if alike else f"{base}+{variant.name}")


def test_golden_vectors_are_the_outputs_of_each_graph(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    bundle = full[1]
    golden = load_golden(bundle.path / bundle.manifest.golden)
    for name, role in bundle.manifest.roles.items():
        for variant in role.variants:
            expected = golden.outputs[name][variant.name]["embedding"]
            for model in variant.models.values():
                with open_session(bundle.path / model) as session:
                    got = session.run(golden.inputs[name])["embedding"]
                assert np.abs(got - expected).max() <= variant.tolerance.max_abs_error
            np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=2e-3)


def test_padding_after_the_end_token_has_no_effect(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    bundle = full[1]
    text = bundle.manifest.processors["text"]
    assert isinstance(text, TextConfig)
    processor = TextProcessor(text, bundle.path / text.tokenizer_file)
    texts = ["a red circle", "x"]
    for model in bundle.manifest.roles["text_encoder"].variants[0].models.values():
        with open_session(bundle.path / model) as session:
            padded = session.run(processor(texts))["embedding"]
            for row, alone in enumerate(texts):
                got = session.run(processor([alone]))["embedding"]
                np.testing.assert_allclose(got[0], padded[row], atol=1e-6)


def test_figures_do_not_depend_on_the_batch(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]], evaluation_folder: Path
) -> None:
    _, bundle, events = full
    manifest = bundle.manifest
    processors = {n: open_processor(c, bundle.path) for n, c in manifest.processors.items()}
    data = read_dataset(evaluation_folder)
    model = ModelSpec(kind_of(manifest), (), {})
    evaluation = Retrieval(Subject(model, processors, bundle.path, data, "a {}", 0))
    for name, role in manifest.roles.items():
        spec = role_of(
            None,
            tuple(item.spec() for item in role.inputs),
            tuple(item.spec() for item in role.outputs),
            lambda *_: {},
            feeds={item.name: item.feed for item in role.inputs},
        )
        graph = bundle.path / role.variants[0].models["onnxruntime"]
        made, sizes = [], []
        for batched in (False, True):
            feeds = list(evaluation.feeds(spec, {}, batched=batched))
            sizes.append([len(next(iter(feed.values()))) for feed in feeds])
            with open_session(graph) as session:
                made.append(evaluation.collect(spec, session.run, feeds, lambda: None, {}))
        one, many = made
        assert set(sizes[0]) == {1}
        assert max(sizes[1]) == 8
        assert sum(sizes[0]) == sum(sizes[1]) == len(one["embedding"])
        np.testing.assert_allclose(many["embedding"], one["embedding"], atol=1e-6)
        stage = f"Measure {name} int8-static"
        assert [e.done for e in events if e.stage == stage] == list(range(1, sum(sizes[0]) + 1))


def test_progress_counts_stages_and_calibration_images(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]],
) -> None:
    events = full[2]
    assert all(0 <= event.done <= event.total for event in events)
    calibrated = [event for event in events if event.stage == "Calibrate image_encoder"]
    assert (calibrated[0].done, calibrated[-1].done, calibrated[0].total) == (1, 40, 40)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages[0] == "Open the source"
    assert stages[1:3] == ["Check the calibration data", "Check the evaluation data"]
    assert stages[-1] == "Write the manifest"


def test_layers_that_are_measured_are_counted(
    clip_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    precisions = ("fp32", "image_encoder:int8-dynamic-keep1")
    config = ConvertConfig(
        str(clip_folder), tmp_path / "clip.mmedge", precisions, calibration=photo_folder
    )
    convert(config, events.append)
    stage = "Measure layers of image_encoder"
    steps = [(event.done, event.total) for event in events if event.stage == stage]
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert len(steps) > 4


def test_provenance_names_tools_and_no_path_of_this_machine(
    full: tuple[ConversionReport, Bundle, list[ProgressEvent]], clip_folder: Path
) -> None:
    report, bundle, _ = full
    provenance = bundle.manifest.provenance
    assert provenance.source == "tiny-clip"
    assert provenance.command == (
        "mmedge convert tiny-clip -o clip.mmedge --precision fp32,fp16,int8 "
        "--calibration photos --evaluate held-out --target cpu"
    )
    assert {"torch", "transformers", "onnxruntime", "mmedge"} < set(provenance.tools)
    assert provenance.calibration_samples == report.calibration_samples == 40
    for path in bundle.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(bundle.path.parent).encode() not in content, path
            assert str(clip_folder.parent).encode() not in content, path


def test_int8_alone_leaves_no_fp32_behind(siglip: Bundle) -> None:
    verify_files(siglip)
    files = {name for name in siglip.manifest.files if "encoder" in name}
    assert not any("fp32" in name for name in files)
    for role in siglip.manifest.roles.values():
        assert {variant.name for variant in role.variants} == {"int8-dynamic", "int8-static"}
        for variant in role.variants:
            assert variant.quality is not None
            assert variant.quality.data.startswith(("photos, held back: 8", "synthetic: 64 "))
            assert variant.quality.samples in (8, 64)
    head = kind_of(siglip.manifest).contrastive_head
    assert head is not None
    assert (head.activation, head.logit_bias) == ("sigmoid", pytest.approx(-10))


@pytest.fixture
def fp32_config(clip_folder: Path, tmp_path: Path) -> ConvertConfig:
    return ConvertConfig(source=str(clip_folder), out=tmp_path / "out" / "clip.mmedge")


def start_cli(config: ConvertConfig, *options: str) -> subprocess.Popen[bytes]:
    command = ["convert", config.source, "-o", str(config.out), *options]
    return subprocess.Popen(
        [sys.executable, "-c", "from mmedge.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )


def test_another_process_writes_the_same_bytes(
    siglip: Bundle, siglip_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = ConvertConfig(str(siglip_folder), tmp_path / "siglip.mmedge")
    data = ("--calibration", str(photo_folder))
    process = start_cli(config, "--precision", "fp32,int8", *data, "--json")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr.decode()
    lines = json.loads(stdout)["variants"]
    assert {line["variant"] for line in lines} == {"fp32", "int8-dynamic", "int8-static"}
    second = open_bundle(config.out).manifest
    files = {name: entry for name, entry in siglip.manifest.files.items() if name != "golden.npz"}
    assert files.items() <= second.files.items()
    for name, role in siglip.manifest.roles.items():
        assert role.variants == second.roles[name].variants[1:]
    assert second.provenance.created == "2023-11-14T22:13:20Z"


def test_an_end_in_the_middle_leaves_nothing(clip_folder: Path, tmp_path: Path) -> None:
    # Both at once: most of their time goes into starting up.
    ends = {signal.SIGKILL: tmp_path / "killed", signal.SIGINT: tmp_path / "interrupted"}
    processes = {
        how: start_cli(
            ConvertConfig(str(clip_folder), folder / "clip.mmedge"), "-q", "--precision", "fp32"
        )
        for how, folder in ends.items()
    }
    deadline = time.monotonic() + 200
    for how, process in processes.items():
        while not list(ends[how].glob(".clip.mmedge.*/image_encoder/*.data")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
    _, stderr = processes[signal.SIGINT].communicate(timeout=60)
    assert processes[signal.SIGINT].returncode == 130, stderr.decode()
    assert b"Interrupted" in stderr
    assert list(ends[signal.SIGINT].iterdir()) == []
    processes[signal.SIGKILL].communicate(timeout=60)
    assert [path.suffix for path in ends[signal.SIGKILL].iterdir()] == [".partial"]
    # The next conversion to the same place clears what the killed one could not.
    damaged = tmp_path / "damaged"
    shutil.copytree(clip_folder, damaged)
    (damaged / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError):
        convert(ConvertConfig(str(damaged), ends[signal.SIGKILL] / "clip.mmedge"))
    assert list(ends[signal.SIGKILL].iterdir()) == []


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_nothing(fp32_config: ConvertConfig) -> None:
    with largest_file(60_000), pytest.raises(StorageError, match=r"fp32\.onnx"):
        convert(fp32_config)
    assert list(fp32_config.out.parent.iterdir()) == []


def test_a_full_disk_keeps_the_older_bundle(
    siglip: Bundle, siglip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "siglip.mmedge"
    shutil.copytree(siglip.path, out)
    before = (out / "manifest.json").read_bytes()

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmedge.converters.pipeline.export_role", write)
    with pytest.raises(StorageError, match="disk is full"):
        convert(ConvertConfig(str(siglip_folder), out, overwrite=True))
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["siglip.mmedge"]


def test_an_existing_bundle_is_not_replaced_unasked(siglip: Bundle, siglip_folder: Path) -> None:
    with pytest.raises(BundleError, match="--overwrite"):
        convert(ConvertConfig(str(siglip_folder), siglip.path))
    verify_files(siglip)


def test_a_graph_that_disagrees_is_never_written(
    siglip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    from onnx import numpy_helper

    def spoil(portable: Path, out: Path) -> None:
        model = onnx.load(portable)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.ndim == 2:
                tensor.CopyFrom(numpy_helper.from_array(array[::-1].copy(), tensor.name))
        onnx.save(model, out)

    monkeypatch.setattr(mmedge.converters.variants.builder, "to_onnxruntime_layout", spoil)
    with pytest.raises(ParityError, match=r"image_encoder/fp32 \(onnxruntime\): .*cosine"):
        convert(ConvertConfig(str(siglip_folder), tmp_path / "x.mmedge"))
    assert list(tmp_path.iterdir()) == []


def test_texts_cannot_be_calibrated_without_captions(tmp_path: Path) -> None:
    images = read_dataset(write_images(tmp_path / "images", 3, 5))
    data = Data(calibration=images, evaluation=None, notes=(), skipped=())
    out = tmp_path / "x.mmedge"
    config = ConvertConfig("m", out, ("fp32", "int8"), calibration=tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    processors = {name: open_processor(each, tmp_path) for name, each in PROCESSORS.items()}
    specs = {
        f"{name}_encoder": role_of(
            None,
            (TensorSpec(name, np.dtype(np.float32), ("batch", 3)),),
            (),
            lambda *_: {},
            feeds={name: ProcessorFeed(processor=name)},
        )
        for name in PROCESSORS
    }

    def plan(config: ConvertConfig, name: str) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
        return plan_role(config, data, name, specs[name], processors)

    recipes, notes = plan(config, "text_encoder")
    assert [recipe.variant for recipe in recipes] == ["fp32", "int8-dynamic"]
    (note,) = notes
    assert note.endswith("text_encoder/int8-static was left out.")
    recipes, notes = plan(config, "image_encoder")
    assert [recipe.variant for recipe in recipes] == ["fp32", "int8-dynamic", "int8-static"]
    assert notes == ()
    named = replace(config, precisions=("int8-static",))
    with pytest.raises(CalibrationError, match="no captions to calibrate text_encoder with"):
        plan(named, "text_encoder")


def test_an_impossible_query_is_refused_with_the_possible_ones(tmp_path: Path) -> None:
    out = tmp_path / "x.mmedge"
    with pytest.raises(ConversionError, match=r"'int3'.*fp32, fp16, .*int8-dynamic"):
        ConvertConfig("m", out, ("fp32", "int3"))
    with pytest.raises(ConversionError, match="No precision"):
        ConvertConfig("m", out, ())
    with pytest.raises(ConversionError, match="--calibration"):
        ConvertConfig("m", out, ("int8-static",))
    with pytest.raises(ConversionError, match="int8-static-symmetric-half needs calibration"):
        ConvertConfig("m", out, ("int8",), targets=("tensorrt",))
    with pytest.raises(ConversionError, match="expected one or more of cpu, tensorrt"):
        ConvertConfig("m", out, targets=("abacus",))
    for template in ("a photo", "a photo of a {label}"):
        with pytest.raises(ConversionError, match=r"no place for the label. Put \{\} there"):
            ConvertConfig("m", out, template=template)


def test_an_int8_image_encoder_beside_an_fp16_text_encoder(
    clip_folder: Path, tmp_path: Path
) -> None:
    precisions = ("image_encoder:int8-dynamic", "text_encoder:fp16")
    report = convert(ConvertConfig(str(clip_folder), tmp_path / "x.mmedge", precisions))
    assert [(line.role, line.variant) for line in report.variants] == [
        ("image_encoder", "int8-dynamic"),
        ("text_encoder", "fp16"),
    ]
    verify_files(open_bundle(report.path))
    with mmedge.load(report.path) as model:
        assert model.encode_text(["a red circle"]).shape == (1, model.embedding_dim)
    unknown = ConvertConfig(str(clip_folder), tmp_path / "y.mmedge", ("fp32", "decoder:fp16"))
    with pytest.raises(ConversionError, match=r"'decoder:fp16': the model has no role 'decoder'"):
        convert(unknown)
    assert not unknown.out.exists()


def test_int8_is_dynamic_and_with_calibration_static_too(tmp_path: Path) -> None:
    def names(*precisions: str, calibration: Path | None = None) -> list[str]:
        config = ConvertConfig("m", tmp_path / "x.mmedge", precisions, calibration=calibration)
        return [recipe.variant for recipe in recipes(config)]

    assert names("int8", "fp32") == ["fp32", "int8-dynamic"]
    assert names("int8", calibration=tmp_path) == ["int8-dynamic", "int8-static"]
    assert names("int8-static", "fp16", calibration=tmp_path) == ["fp16", "int8-static"]


def test_a_source_date_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    source = Source(tmp_path, "m", None, {}, (), {})
    config = ConvertConfig("m", tmp_path / "x.mmedge")
    with pytest.raises(ConversionError, match="'yesterday'"):
        describe_provenance(source, config, "0", calibration_sha256=None, calibration_samples=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_weights_beyond_two_gigabytes(tmp_path: Path) -> None:
    # A protobuf ends at 2 GiB; 17 million rows of 32 floats are a little more.
    rows = 2**31 // (32 * 4) + 1000
    folder = write_clip(tmp_path / "large", vocab_size=rows)
    config = ConvertConfig(str(folder), tmp_path / "large.mmedge", ("fp32",))
    process = start_cli(config, "--precision", "fp32", "--json")
    _, stderr = process.communicate(timeout=1000)
    assert process.returncode == 0, stderr.decode()
    bundle = open_bundle(config.out)
    verify_files(bundle)
    fp32 = bundle.manifest.roles["text_encoder"].variants[0]
    assert fp32.size_bytes > 2**31
    assert fp32.parity is not None
    assert fp32.parity.cosine_min > 0.9999
    # Kept once, whatever the number of layouts.
    assert fp32.size_bytes < 1.01 * 2**31
    assert (bundle.path / fp32.models["portable"]).stat().st_size < 1e6
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # Measured 1.3 times the weights; twice would be a copy of them.
    assert peak_kb * 1024 < 2 * 2**31
