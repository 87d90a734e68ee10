"""Fixtures of tiny sources and of bundles converted from them, made once for all tests."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

__all__ = [
    "clap_bundle",
    "clap_folder",
    "clip_folder",
    "dinov2_bundle",
    "dinov2_folder",
    "evaluation_folder",
    "gpt2_bundle",
    "gpt2_folder",
    "owlv2_bundle",
    "owlv2_folder",
    "owlvit_bundle",
    "owlvit_folder",
    "photo_folder",
    "resnet_bundle",
    "resnet_folder",
    "rt_detr_bundle",
    "rt_detr_folder",
    "sentence_bundle",
    "sentence_folder",
    "siglip_folder",
    "tapped_bundle",
    "toy_head_bundle",
    "vit_bundle",
    "vit_folder",
    "write_images",
    "write_scenes",
    "write_sounds",
]

SCENE_LABELS = ("red circle", "green square", "blue star")
LABELS = ("red circle", "green square", "blue star", "yellow ring")


def write_images(folder: Path, count: int, seed: int, *, captions: bool = False) -> Path:
    """Write images of noise over a colour, with captions and labels where asked."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        base = rng.integers(0, 256, 3)
        noise = rng.normal(0, 30, (40, 56, 3))
        name = f"{index:03d}.png"
        Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(folder / name)
        label = LABELS[index % len(LABELS)]
        caption = f"image {index} of a {label}"
        lines.append(json.dumps({"image": name, "caption": caption, "label": label}))
    if captions:
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_sounds(folder: Path, count: int, seed: int) -> Path:
    """Write WAV files of 0.3 to 1.4 s at 16 kHz, a tone each in noise, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        time = np.arange(int(16_000 * rng.uniform(0.3, 1.4))) / 16_000
        hz = rng.uniform(100, 3500)
        sound = 0.4 * np.sin(2 * np.pi * hz * time) + 0.05 * rng.standard_normal(len(time))
        with wave.open(str(folder / f"{index:03d}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((sound.clip(-1, 1) * 32_767).astype("<i2").tobytes())
        lines.append(json.dumps({"audio": f"{index:03d}.wav", "caption": f"a tone of {hz:.0f} Hz"}))
    path = folder / "sounds.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_scenes(folder: Path, count: int, seed: int) -> Path:
    """Write images of coloured boxes on noise, and a COCO file of them; return the COCO file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index in range(count):
        width, height = (int(side) for side in rng.integers(40, 90, 2))
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(int(rng.integers(1, 4))):
            left, top = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
            right, bottom = left + int(rng.integers(8, 40)), top + int(rng.integers(8, 40))
            kind = int(rng.integers(0, 3))
            image[top:bottom, left:right, kind] = 230
            box = [left, top, min(right, width) - left, min(bottom, height) - top]
            annotations.append({"image_id": index, "category_id": 10 + kind, "bbox": box})
        name = f"{index:03d}.png"
        Image.fromarray(image).save(folder / name)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
    categories = [{"id": 10 + kind, "name": label} for kind, label in enumerate(SCENE_LABELS)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLAP in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_clap

    return write_clap(tmp_path_factory.mktemp("sources") / "tiny-clap")


@pytest.fixture(scope="session")
def clap_bundle(clap_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLAP in fp32 and int8-dynamic, judged on held-out sounds; not to be changed."""
    from mmedge.converters import ConvertConfig, convert

    folder = tmp_path_factory.mktemp("clap")
    convert(
        ConvertConfig(
            str(clap_folder),
            folder / "clap.mmedge",
            precisions=("fp32", "int8-dynamic"),
            calibration=write_sounds(folder / "calibration", 32, 1),
            evaluate=write_sounds(folder / "held-out", 12, 2),
        )
    )
    return folder / "clap.mmedge"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_clip

    return write_clip(tmp_path_factory.mktemp("sources") / "tiny-clip")


@pytest.fixture(scope="session")
def tapped_bundle(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP with taps, in fp32 and int8-dynamic; not to be changed."""
    from mmedge.converters import ConvertConfig, convert

    out = tmp_path_factory.mktemp("tapped") / "clip.mmedge"
    precisions = ("fp32", "int8-dynamic")
    convert(ConvertConfig(str(clip_folder), out, precisions, taps=("patches", "tokens")))
    return out


@pytest.fixture(scope="session")
def toy_head_bundle(tapped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy head on the tapped tiny CLIP, in fp32; not to be changed."""
    from toy_heads import write_toy_head

    return write_toy_head(tapped_bundle, tmp_path_factory.mktemp("heads") / "toy.mmedge")


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_siglip

    return write_siglip(tmp_path_factory.mktemp("sources") / "tiny-siglip")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_gpt2

    return write_gpt2(tmp_path_factory.mktemp("sources") / "tiny-gpt2")


@pytest.fixture(scope="session")
def gpt2_bundle(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 in fp32 and int8-dynamic, judged on held-out texts; not to be changed."""
    from mmedge.converters import ConvertConfig, convert

    folder = tmp_path_factory.mktemp("gpt2")
    texts = [f"text {number} of a {label}" for number, label in enumerate(LABELS * 3)]
    lines = "".join(json.dumps({"caption": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")
    out = folder / "gpt2.mmedge"
    convert(
        ConvertConfig(
            str(gpt2_folder),
            out,
            precisions=("fp32", "int8-dynamic"),
            evaluate=folder / "texts.jsonl",
        )
    )
    return out


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with a classification head, in transformers' format; not to be changed."""
    from models.tiny_models import write_vit

    return write_vit(tmp_path_factory.mktemp("sources") / "tiny-vit")


@pytest.fixture(scope="session")
def vit_bundle(
    vit_folder: Path,
    photo_folder: Path,
    evaluation_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny ViT in fp32 and int8, judged on labelled images; not to be changed."""
    return convert_images(vit_folder, photo_folder, evaluation_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with a classification head, in transformers' format; not to be changed."""
    from models.tiny_models import write_dinov2

    return write_dinov2(tmp_path_factory.mktemp("sources") / "tiny-dinov2")


@pytest.fixture(scope="session")
def dinov2_bundle(
    dinov2_folder: Path,
    photo_folder: Path,
    evaluation_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny DINOv2 in fp32 and int8, judged on labelled images; not to be changed."""
    return convert_images(dinov2_folder, photo_folder, evaluation_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet with a classification head, in transformers' format; not to be changed."""
    from models.tiny_models import write_resnet

    return write_resnet(tmp_path_factory.mktemp("sources") / "tiny-resnet")


@pytest.fixture(scope="session")
def resnet_bundle(
    resnet_folder: Path,
    photo_folder: Path,
    evaluation_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny ResNet in fp32 and int8, judged on labelled images; not to be changed."""
    return convert_images(resnet_folder, photo_folder, evaluation_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder in sentence-transformers' format; not to be changed."""
    from models.tiny_models import write_sentence_transformer

    return write_sentence_transformer(tmp_path_factory.mktemp("sources") / "tiny-sentences")


@pytest.fixture(scope="session")
def sentence_bundle(sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text encoder in fp32 and int8, judged on held-out texts; not to be changed."""
    from mmedge.converters import ConvertConfig, convert

    folder = tmp_path_factory.mktemp("sentences")
    for name, count in (("calibration", 36), ("held-out", 20)):
        texts = (f"{name} text {i} of a {LABELS[i % len(LABELS)]}" for i in range(count))
        lines = "".join(json.dumps({"caption": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    convert(
        ConvertConfig(
            str(sentence_folder),
            folder / "sentences.mmedge",
            precisions=("fp32", "int8"),
            calibration=folder / "calibration.jsonl",
            evaluate=folder / "held-out.jsonl",
        )
    )
    return folder / "sentences.mmedge"


def convert_images(
    source: Path, calibration: Path, evaluation: Path, factory: pytest.TempPathFactory
) -> Path:
    """Convert an image model to fp32 and int8, judged on labelled images."""
    from mmedge.converters import ConvertConfig, convert

    out = factory.mktemp("image-models") / f"{source.name}.mmedge"
    precisions = ("fp32", "int8")
    convert(
        ConvertConfig(str(source), out, precisions, calibration=calibration, evaluate=evaluation)
    )
    return out


@pytest.fixture(scope="session")
def owlvit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OWL-ViT in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_owl

    return write_owl(tmp_path_factory.mktemp("sources") / "tiny-owlvit")


@pytest.fixture(scope="session")
def owlv2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OWLv2 in transformers' on-disk format; not to be changed."""
    pytest.importorskip("scipy", reason="transformers' image processor of OWLv2 needs it")
    from models.tiny_models import write_owl

    return write_owl(tmp_path_factory.mktemp("sources") / "tiny-owlv2", second=True)


@pytest.fixture(scope="session")
def owlvit_bundle(owlvit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OWL-ViT in fp32 and int8-dynamic, judged on scenes; not to be changed."""
    folder = tmp_path_factory.mktemp("owlvit")
    return _convert_detector(owlvit_folder, folder, write_scenes(folder / "scenes", 12, 1))


@pytest.fixture(scope="session")
def owlv2_bundle(owlv2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OWLv2 in fp32 and int8-dynamic, judged on synthetic images; not to be changed."""
    return _convert_detector(owlv2_folder, tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="session")
def rt_detr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RT-DETR in transformers' on-disk format; not to be changed."""
    from models.tiny_models import write_rt_detr

    return write_rt_detr(tmp_path_factory.mktemp("sources") / "tiny-rt-detr")


@pytest.fixture(scope="session")
def rt_detr_bundle(rt_detr_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny RT-DETR in fp32 and int8-dynamic, judged on scenes; not to be changed."""
    folder = tmp_path_factory.mktemp("rt-detr")
    return _convert_detector(rt_detr_folder, folder, write_scenes(folder / "scenes", 12, 1))


def _convert_detector(source: Path, folder: Path, evaluate: Path | None = None) -> Path:
    from mmedge.converters import ConvertConfig, convert

    out = folder / "detector.mmedge"
    precisions = ("fp32", "int8-dynamic")
    convert(ConvertConfig(str(source), out, precisions=precisions, evaluate=evaluate))
    return out


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images with captions, for calibration."""
    return write_images(tmp_path_factory.mktemp("data") / "photos", 40, 1, captions=True)


@pytest.fixture(scope="session")
def evaluation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four other images with captions and labels."""
    return write_images(tmp_path_factory.mktemp("data") / "held-out", 24, 2, captions=True)
