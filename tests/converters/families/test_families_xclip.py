"""X-CLIP: videos and texts as with transformers, from files to labels adapted to a video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from describing import changed_config, describe
from models.tiny_video import FRAMES, moving, write_video, write_xclip
from transformers import AutoTokenizer, VideoMAEImageProcessorPil, XCLIPModel
from typer.testing import CliRunner

import mmedge
from mmedge import DualEncoder
from mmedge.bundle import open_bundle
from mmedge.cli.app import app
from mmedge.converters import ConvertConfig, convert
from mmedge.errors import InputError, ManifestError, ShapeError, SourceError
from mmedge.sessions.verification import verify_bundle

TEXTS = ["a red circle", "blue", "a very long text about a green star " * 5, "x"]
VIDEOS = [moving(seed) for seed in range(5)]


@dataclass(frozen=True)
class Converted:
    folder: Path
    bundle: Path
    videos: list[Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The tiny X-CLIP in fp32 and int8, judged on held-out videos with captions."""
    place = tmp_path_factory.mktemp("xclip")
    folder = write_xclip(place / "source")
    videos = [write_video(place / f"{n}.mp4", moving(n, 6 + n)) for n in range(12)]
    for name, part in (("calibration", videos[:8]), ("held-out", videos[8:])):
        lines = (
            json.dumps({"video": path.name, "caption": f"a video called {path.stem}"})
            for path in part
        )
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    convert(
        ConvertConfig(
            str(folder),
            place / "xclip.mmedge",
            precisions=("fp32", "int8"),
            calibration=place / "calibration.jsonl",
            evaluate=place / "held-out.jsonl",
        )
    )
    return Converted(folder, place / "xclip.mmedge", videos)


@pytest.fixture(scope="module")
def encoder(converted: Converted) -> Iterator[DualEncoder]:
    with DualEncoder.load(converted.bundle, precision="fp32") as model:
        yield model


@pytest.fixture(scope="module")
def reference(converted: Converted) -> Any:
    model = XCLIPModel.from_pretrained(converted.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted.folder)
    frames = VideoMAEImageProcessorPil.from_pretrained(converted.folder)
    texts = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return (
            model(**texts, **frames([list(video) for video in VIDEOS], return_tensors="pt")),
            model.get_text_features(**texts).pooler_output,
        )


def test_videos_and_texts_embed_as_with_transformers(encoder: DualEncoder, reference: Any) -> None:
    whole, texts = reference
    got = encoder.encode_video(VIDEOS)
    np.testing.assert_allclose(got, whole.video_embeds.numpy(), atol=2e-5)
    assert got.std(axis=0).mean() > 0.01  # they differ
    for item in (VIDEOS[2], list(VIDEOS[2])):
        np.testing.assert_allclose(encoder.encode_video(item), got[2:3], atol=2e-5)
    np.testing.assert_allclose(encoder.encode_video(iter(VIDEOS), batch_size=2), got, atol=2e-5)
    unit = torch.nn.functional.normalize(texts, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_text(TEXTS), unit, atol=2e-5)


def test_labels_are_adapted_to_each_video_as_with_transformers(
    encoder: DualEncoder, reference: Any
) -> None:
    whole, _ = reference
    expected = whole.logits_per_video.softmax(dim=-1).numpy()
    found = encoder.classify_video(VIDEOS, TEXTS).probabilities
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(encoder.classify_video(VIDEOS[1], TEXTS).probabilities, found[1:2],
                               atol=2e-5)  # fmt: skip
    # The dual encoder's own similarities are others, whichever were computed first.
    head = encoder.manifest.kind.contrastive_head  # type: ignore[union-attr]
    plain = encoder.encode_video(VIDEOS) @ encoder.encode_text(TEXTS).T * head.logit_scale
    assert np.abs(plain - whole.logits_per_video.numpy()).max() > 0.5
    alone = encoder.classify(encoder.encode_video(VIDEOS), TEXTS, template="{}").probabilities
    own = torch.tensor(plain).softmax(dim=-1).numpy()
    np.testing.assert_allclose(alone, own, atol=1e-4)


def test_more_labels_than_a_call_takes_run_in_parts(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [f"thing {number}" for number in range(300)]
    calls = []
    run = encoder._run

    def counted(role: str, feed: Any) -> Any:
        calls.append(role)
        return run(role, feed)

    monkeypatch.setattr(encoder, "_run", counted)
    found = encoder.classify_video(VIDEOS[:2], labels)
    assert calls.count("text_prompter") == 2
    assert found.probabilities.shape == (2, 300)
    few = encoder.classify_video(VIDEOS[:2], labels[:2]).probabilities
    ratio = found.probabilities[:, 0] / found.probabilities[:, 1]
    np.testing.assert_allclose(ratio, few[:, 0] / few[:, 1], rtol=1e-4)


def test_int8_opens_runs_and_is_near(converted: Converted, encoder: DualEncoder) -> None:
    assert all(result.passed for result in verify_bundle(open_bundle(converted.bundle)))
    with DualEncoder.load(converted.bundle, precision="int8") as small:
        assert (small.encode_video(VIDEOS) * encoder.encode_video(VIDEOS)).sum(1).min() > 0.97
        assert (small.encode_text(TEXTS) * encoder.encode_text(TEXTS)).sum(1).min() > 0.97
        near = small.classify_video(VIDEOS, TEXTS).probabilities
    assert np.abs(near - encoder.classify_video(VIDEOS, TEXTS).probabilities).max() < 0.2
    roles = open_bundle(converted.bundle).manifest.roles
    kinds = {name: roles[name].variants[-1].name for name in roles}
    assert kinds == {
        "video_encoder": "int8-static",
        "text_encoder": "int8-static",
        "text_prompter": "int8-dynamic",
    }
    quality = roles["video_encoder"].variants[-1].quality
    assert quality is not None
    assert quality.data == "held-out.jsonl: 4 videos"
    assert "recall@1" in quality.drops


def test_a_video_file_is_run_from_the_command_line(
    converted: Converted, encoder: DualEncoder
) -> None:
    arguments = ["run", str(converted.bundle), "--video", str(converted.videos[3]), "--json"]
    arguments += ["--precision", "fp32"]
    labels = [part for text in TEXTS for part in ("--text", text)]
    classified = CliRunner().invoke(app, arguments + labels)
    assert classified.exit_code == 0, classified.output
    result = json.loads(classified.stdout)
    best = encoder.classify_video(converted.videos[3], TEXTS).top()[0][0]
    assert (result["task"], result["results"][0]["label"]) == ("classify", best.label)
    embedded = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert embedded["task"] == "embed"
    expected = encoder.encode_video(converted.videos[3])[0]
    np.testing.assert_allclose(embedded["results"][0]["embedding"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ([], InputError, "Videos: got none"),
        ([[]], ShapeError, "got no frames, the model takes 4"),
        (moving(1, FRAMES + 1), ShapeError, "got 5 frames, the model takes 4"),
        (["a.mp4", "b.mp4"], InputError, r"^videos\[0\]: a\.mp4: no such file"),
    ],
)
def test_videos_that_cannot_be_used_are_refused(
    item: Any, error: type[Exception], message: str, encoder: DualEncoder
) -> None:
    with pytest.raises(error, match=message):
        encoder.encode_video(item)
    with pytest.raises(error, match=message):
        encoder.classify_video(item, TEXTS)


def test_images_are_not_taken_for_videos(encoder: DualEncoder) -> None:
    with pytest.raises(InputError, match="holds no image_encoder"):
        encoder.encode_image(VIDEOS[0][0])


def test_videos_need_a_video_encoder(converted: Converted) -> None:
    with DualEncoder.load(converted.bundle, roles=["text_encoder"]) as model:
        for call in (model.encode_video, lambda video: model.classify_video(video, TEXTS)):
            with pytest.raises(InputError, match="video_encoder was not loaded"):
                call(VIDEOS[0])


def test_labels_need_the_prompter(converted: Converted) -> None:
    with DualEncoder.load(converted.bundle, roles=["video_encoder", "text_encoder"]) as model:
        assert model.encode_video(VIDEOS[0]).shape == (1, 32)
        with pytest.raises(InputError, match="text_prompter was not loaded"):
            model.classify_video(VIDEOS[0], TEXTS)


@pytest.mark.parametrize("lost", ["projected", "context"])
def test_a_prompter_that_is_fed_by_nothing_is_refused(
    lost: str, converted: Converted, tmp_path: Path
) -> None:
    copy = shutil.copytree(converted.bundle, tmp_path / "copy.mmedge")
    manifest = json.loads((copy / "manifest.json").read_text())
    for entry in manifest["roles"]["text_prompter"]["inputs"]:
        if entry["name"] == lost:
            entry["feed"] = {"caller": True}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"text_prompter: expected inputs 'projected'"):
        mmedge.load(copy)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"num_frames": 0}, "num_frames"),
        ("vision_config", {"num_frames": 6}, "weights do not fit config.json"),
        ("vision_config", {"image_size": 40}, "gives images of 32x32, but the model takes 40x40"),
        ("text_config", {"vocab_size": 8}, "the embedding table has 8 rows"),
    ],
)
def test_configurations_that_disagree_are_refused(
    section: str, changes: dict[str, int], message: str, converted: Converted, tmp_path: Path
) -> None:
    copy = changed_config(converted.folder, tmp_path, **{section: changes})
    with pytest.raises(SourceError, match=message):
        describe(copy)
