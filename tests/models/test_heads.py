"""The contract of heads: fingerprints, missing inputs, skew, shapes."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy_heads import FLOAT, INPUTS, LABELS, OUTPUTS, SONAR, WIDTH, ToyHead, toy_spec

import mmedge
from mmedge.bundle import Bundle, open_bundle
from mmedge.bundle.kinds import FusedKind
from mmedge.bundle.kinds.heads import HeadInput, HeadSection
from mmedge.bundle.manifest import Manifest
from mmedge.bundle.tensors import CallerFeed, InputEntry
from mmedge.converters import ConvertConfig, HeadSpec, SensorInput, TapInput, convert_module
from mmedge.errors import (
    BundleError,
    ConversionError,
    InputError,
    IntegrityError,
    ShapeError,
    SpaceMismatchError,
)
from mmedge.files.safetensors_file import write_safetensors
from mmedge.models import DualEncoder
from mmedge.models.features import Features
from mmedge.models.fused import FusedModel
from mmedge.models.heads import Head, Stamped, learned_defaults
from mmedge.specs import Array, Modality, TensorSpec

FRAME = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
HEARD = np.linspace(-1, 1, SONAR, dtype=np.float32)
TEXT = "a red star"


@pytest.fixture(scope="module")
def clip(tapped_bundle: Path) -> Iterator[DualEncoder]:
    with DualEncoder.load(tapped_bundle, precision="fp32") as model:
        yield model


@pytest.fixture
def head(toy_head_bundle: Path, clip: DualEncoder) -> Iterator[FusedModel]:
    with mmedge.load_head(toy_head_bundle, on=clip) as loaded:
        yield loaded


def expected(
    features: Features, texts: Features | None, sonar: Array | None
) -> tuple[Array, Array]:
    """What the module gives in PyTorch."""
    learned = toy_spec(Path()).inputs["words"].default
    assert learned is not None
    words = learned[None] if texts is None else texts["tokens"]
    mask = np.ones(words.shape[:2], np.bool_) if texts is None else texts.masks["tokens"]
    heard = np.full((1, SONAR), 9, np.float32) if sonar is None else sonar[None]
    given = (features["patches"], words, mask, heard, np.array([[sonar is not None]]))
    with torch.inference_mode():
        scores, attention = ToyHead()(*(torch.from_numpy(each) for each in given))
    return scores.numpy(), attention.numpy()


def test_a_head_reads_taps_texts_and_sensors(head: FusedModel, clip: DualEncoder) -> None:
    features = clip.extract(FRAME, time=10.0)
    texts = clip.extract_text(TEXT)
    scores, attention = expected(features, texts, HEARD)
    out = head(features, TEXT, {"sonar": Stamped(HEARD, 10.02)})
    np.testing.assert_allclose(out.scores, scores, atol=1e-4)
    np.testing.assert_allclose(out["map"], attention, atol=1e-4)
    assert out.labels == head.labels == LABELS
    assert out.best == (LABELS[int(scores.argmax())],)
    assert (out.left_out, out.latency_ms > 0) == ({}, True)
    by_name = head({"patches": features, "words": TEXT, "sonar": Stamped(HEARD, 10.02)})
    np.testing.assert_array_equal(by_name.scores, out.scores)
    with pytest.raises(InputError, match="No output 'boxes'"):
        out["boxes"]


def test_one_frame_stands_for_all_texts(head: FusedModel, clip: DualEncoder) -> None:
    features = clip.extract(FRAME, time=1.0)
    out = head(features, [TEXT, "a", "a blue circle"])
    assert out.scores.shape == (3, 3)
    alone = head(features, "a")
    np.testing.assert_allclose(out.scores[1], alone.scores[0], atol=1e-5)
    frames = clip.extract(np.stack([FRAME, FRAME]), time=1.0)
    with pytest.raises(ShapeError, match=r"'patches': 2, 'words': 3.*expected 1 or 3 of 'patches'"):
        head(frames, [TEXT, "a", "b"])


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_a_missing_input_follows_its_policy(
    heard: bool, told: bool, head: FusedModel, clip: DualEncoder
) -> None:
    features = clip.extract(FRAME, time=1.0)
    given: list[Any] = [features]
    given += [TEXT] if told else []
    given += [{"sonar": Stamped(HEARD, 1.0)}] if heard else []
    out = head(*given)
    texts = clip.extract_text(TEXT) if told else None
    scores, _ = expected(features, texts, HEARD if heard else None)
    np.testing.assert_allclose(out.scores, scores, atol=1e-4)
    missing = {name for name, there in (("words", told), ("sonar", heard)) if not there}
    assert out.left_out == dict.fromkeys(missing, "missing")
    assert head.head.counts == {"calls": 1} | {f"{name} missing": 1 for name in missing}


def test_an_input_that_is_refused_is_never_zero(head: FusedModel) -> None:
    with pytest.raises(
        InputError, match=r"'patches'.*is missing, and the head does not do without"
    ):
        head(TEXT)
    assert head.head.counts == {}


def test_a_sensor_that_is_too_old_is_left_out_and_counted(
    head: FusedModel, clip: DualEncoder
) -> None:
    features = clip.extract(FRAME, time=5.0)
    inside = head(features, TEXT, {"sonar": Stamped(HEARD, 4.95)})
    outside = head(features, TEXT, {"sonar": Stamped(HEARD, 4.94)})
    assert inside.left_out == {}
    assert outside.left_out == {"sonar": "skewed by 60 ms, at most 50"}
    np.testing.assert_array_equal(outside.scores, head(features, TEXT).scores)
    assert head.head.counts == {"calls": 3, "sonar skewed": 1, "sonar missing": 1}


def test_a_frame_that_is_too_old_is_refused(head: FusedModel, clip: DualEncoder) -> None:
    with pytest.raises(InputError, match=r"'patches' .* is skewed by 200 ms, at most 100"):
        head(clip.extract(FRAME, time=5.0), TEXT, {"sonar": Stamped(HEARD, 5.2)})
    with pytest.raises(InputError, match=r"has no time.*extract\(frame, time=...\)"):
        head(clip.extract(FRAME), TEXT)
    with pytest.raises(InputError, match="is skewed by nan ms"):
        head(clip.extract(FRAME, time=float("nan")), TEXT)


@pytest.mark.parametrize(
    ("sonar", "error", "message"),
    [
        (np.full(SONAR, np.nan), InputError, "NaN, infinity or more.*Leave the input out"),
        (np.zeros(SONAR + 1), ShapeError, r"'sonar'.*got \(1, 9\), expected \('batch', 8\)"),
        (np.zeros((2, 2, SONAR)), ShapeError, "'sonar'.*got"),
        (np.float32(3), ShapeError, r"'sonar'.*got \(\), expected \('batch', 8\)"),
        (np.zeros((0, SONAR)), ShapeError, r"'sonar'.*got \(0, 8\)"),
        (np.full(SONAR, 1e39), InputError, "more than float32 holds"),
        ([[1, 2], [3]], InputError, "rows of several lengths"),
        (None, InputError, "got NoneType, expected an array of numbers"),
        ("loud", InputError, "got str, expected an array of numbers"),
        (np.array(["a"] * SONAR), InputError, "expected an array of numbers"),
    ],
)
def test_a_sensor_with_another_array(
    sonar: Any, error: type[Exception], message: str, head: FusedModel, clip: DualEncoder
) -> None:
    with pytest.raises(error, match=message):
        head(clip.extract(FRAME, time=1.0), TEXT, {"sonar": Stamped(sonar, 1.0)})


def test_unknown_and_surplus_inputs(head: FusedModel, clip: DualEncoder) -> None:
    features = clip.extract(FRAME, time=1.0)
    with pytest.raises(InputError, match=r"Unknown input 'sonr' .* Did you mean sonar"):
        head(features, {"sonr": HEARD})
    with pytest.raises(InputError, match=r"'patches' .* is given twice"):
        head(features, {"patches": features})
    with pytest.raises(InputError, match="got Features, expected an array"):
        head(features, TEXT, {"sonar": features})
    with pytest.raises(InputError, match="takes no image features beside"):
        head(features, features)
    with pytest.raises(InputError, match=r"'patches' .*: got ndarray, expected features"):
        head({"patches": FRAME})


def test_more_tokens_than_the_graph_takes(head: FusedModel, clip: DualEncoder) -> None:
    texts = clip.extract_text(TEXT)
    longest = head.manifest.roles["toy"].axes["tokens"].max
    wide = np.zeros((1, longest + 1, WIDTH), np.float32)
    long = Features(texts.modality, {**texts.arrays, "tokens": wide}, {}, texts.spaces, texts.time)
    with pytest.raises(ShapeError, match=f"tokens at most {longest}. Pass fewer"):
        head(clip.extract(FRAME, time=1.0), long)


def test_a_head_of_another_encoder_is_refused_before_anything_runs(
    toy_head_bundle: Path, tiny_bundle: Bundle, clip: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("a session was opened")

    with DualEncoder.load(tiny_bundle.path) as other:
        monkeypatch.setattr("mmedge.models.load.open_fastest", never)
        with pytest.raises(
            SpaceMismatchError, match=r"reads the tap 'patches' of clip-.*tiny-0001"
        ):
            mmedge.load_head(toy_head_bundle, on=other)
    with pytest.raises(BundleError, match="is a dual_encoder bundle, no head"):
        mmedge.load_head(clip.bundle.path, on=clip)
    with pytest.raises(InputError, match=r"on= got \[\], expected an encoder"):
        mmedge.load_head(toy_head_bundle, on=[])
    nothing: Any = None
    with pytest.raises(InputError, match=r"on= got \['NoneType'\], expected an encoder"):
        mmedge.load_head(toy_head_bundle, on=nothing)


def test_features_of_another_encoder_are_refused(head: FusedModel, clip: DualEncoder) -> None:
    features = clip.extract(FRAME, time=1.0)
    spaces = {tap: space.replace("clip-", "clip-0") for tap, space in features.spaces.items()}
    other = Features(features.modality, features.arrays, features.masks, spaces, 1.0)
    with pytest.raises(SpaceMismatchError, match="reads the tap 'patches' of clip-"):
        head(other, TEXT)


def test_an_encoder_without_the_tap_is_refused(toy_head_bundle: Path, clip: DualEncoder) -> None:
    with (
        DualEncoder.load(clip.bundle.path, roles=["image_encoder"]) as half,
        pytest.raises(InputError, match=r"'words' of head toy reads the text modality"),
    ):
        mmedge.load_head(toy_head_bundle, on=half)


def test_the_manifest_says_what_a_head_reads(toy_head_bundle: Path, tapped_bundle: Path) -> None:
    manifest = open_bundle(toy_head_bundle).manifest
    kind = manifest.kind
    assert isinstance(kind, FusedKind)
    taps = open_bundle(tapped_bundle).variant("image_encoder", "fp32").taps
    assert kind.head.inputs["patches"].space == taps["patches"]
    assert {name: each.missing for name, each in kind.head.inputs.items()} == {
        "patches": "refuse", "words": "default", "sonar": "marginalize",
    }  # fmt: skip
    assert dict(manifest.kind.facts())["reads sonar"] == (
        "sensor; missing: marginalize, 50 ms of skew at most"
    )
    assert all(result.passed for result in mmedge.verify_bundle(open_bundle(toy_head_bundle)))
    damaged = manifest.model_dump(mode="json")
    damaged["kind"]["head"]["inputs"]["sonar"]["missing"] = "refuse"
    with pytest.raises(ValueError, match="'present' goes with inputs that are marginalized"):
        Manifest.model_validate(damaged)


def test_a_damaged_file_of_defaults(
    toy_head_bundle: Path, clip: DualEncoder, tmp_path: Path
) -> None:
    path = shutil.copytree(toy_head_bundle, tmp_path / "head.mmedge")
    data = (path / "toy.safetensors").read_bytes()
    (path / "toy.safetensors").write_bytes(b"\xff" * len(data))
    with (
        mmedge.load_head(path, on=clip) as head,
        pytest.raises(BundleError, match="is no safetensors file"),
    ):
        head(clip.extract(FRAME, time=1.0))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"words": np.zeros((2, WIDTH + 1), np.float32)},
        {"words": np.zeros(WIDTH, np.float32)},
        {"words": np.full((2, WIDTH), np.nan, np.float32)},
    ],
)
def test_defaults_that_do_not_fit(
    arrays: dict[str, Array], toy_head_bundle: Path, clip: DualEncoder, tmp_path: Path
) -> None:
    path = shutil.copytree(toy_head_bundle, tmp_path / "head.mmedge")
    bundle, role = open_bundle(path), "toy"
    write_safetensors(path / "toy.safetensors", arrays)
    kind = bundle.manifest.kind
    assert isinstance(kind, FusedKind)
    with pytest.raises(IntegrityError, match=r"default of input 'words': got .*expected finite"):
        learned_defaults(bundle, kind.head, role)


def test_features_of_two_encoders_of_one_modality_find_their_inputs() -> None:
    inputs = {
        name: HeadInput(modality=Modality.IMAGE, tap="embedding", space=name) for name in "ab"
    }
    entries = tuple(
        InputEntry.of(TensorSpec(name, FLOAT, ("batch", 4)), CallerFeed()) for name in "ab"
    )
    role: Any = SimpleNamespace(inputs=entries, axes={})
    bound = Head("two", HeadSection(inputs=inputs), role, dict, {}, ())
    a, b = (
        Features(Modality.IMAGE, {"embedding": np.full((1, 4), value, np.float32)}, {},
                 {"embedding": space})
        for space, value in (("a", 1), ("b", 2))
    )  # fmt: skip
    for given in ((a, b), (b, a)):
        outputs = bound(*given).outputs
        assert [outputs[name][0, 0] for name in "ab"] == [1, 2]
    with pytest.raises(InputError, match="Input 'b' of head two is missing"):
        bound(a)


def test_a_head_goes_to_another_process_with_its_encoder(
    head: FusedModel, clip: DualEncoder
) -> None:
    features = clip.extract(FRAME, time=1.0)
    with pickle.loads(pickle.dumps(head)) as other:  # noqa: S301, our own
        np.testing.assert_array_equal(other(features, TEXT).scores, head(features, TEXT).scores)


def convert_toy(on: Path, out: Path, module: torch.nn.Module | None = None, **changes: Any) -> None:
    convert_module(
        module or ToyHead(),
        ConvertConfig("toy", out),
        inputs=INPUTS,
        outputs=OUTPUTS,
        head=toy_spec(on, **changes),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": TapInput(tap="patch")}, "the encoders have image embedding, image patches"),
        ({"patches": TapInput(tap="embedding")}, r"is float32\('batch', 16, 32\), but the tap"),
        ({"words": TapInput(modality="text", tap="tokens", missing="default")}, "go together"),
        (
            {"words": SensorInput(missing="default", default=np.zeros((2, 5)))},
            r"the default is \(2, 5\), expected finite values of \('tokens', 32\)",
        ),
        ({"radar": SensorInput()}, "'radar' is none of the module's"),
    ],
)
def test_a_head_that_contradicts_itself(
    changes: dict[str, Any], message: str, tapped_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_toy(tapped_bundle, tmp_path / "x.mmedge", **changes)


def test_a_marginalized_input_must_change_nothing_where_it_is_absent(
    tapped_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="'sonar' is marginalized, but the outputs depend"):
        convert_toy(tapped_bundle, tmp_path / "x.mmedge", ToyHead(leaks=True))


@pytest.mark.parametrize(
    ("sensor", "changes", "message"),
    [
        ({"max_skew_ms": -1}, {}, "max_skew_ms: got -1: .* greater than or equal to 0"),
        ({"max_skew_ms": np.inf}, {}, "max_skew_ms: got inf"),
        ({"missing": "zeros"}, {}, "missing: got 'zeros'"),
        ({}, {"labels": ("yes", "")}, r"labels\.1: got ''"),
        ({}, {"meanings": {"scores": "sense"}}, r"meanings\.scores: got 'sense'"),
        ({}, {"inputs": {}}, "inputs: got"),
    ],
)
def test_a_description_that_no_manifest_takes(
    sensor: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    spec = HeadSpec(**{"on": (), "inputs": {"x": SensorInput(**sensor)}, **changes})
    given = () if "inputs" in changes else (TensorSpec("x", FLOAT, ("batch", 2)),)
    with pytest.raises(ConversionError, match=f"Head toy: {message}"):
        spec.section(given, "toy")


def test_an_input_that_nobody_describes(tapped_bundle: Path) -> None:
    spec = HeadSpec(on=tapped_bundle, inputs={"patches": TapInput(tap="patches")})
    with pytest.raises(ConversionError, match="input 'other' is described by no head input"):
        spec.section([INPUTS[0], TensorSpec("other", FLOAT, ("batch", 2))], "head")
