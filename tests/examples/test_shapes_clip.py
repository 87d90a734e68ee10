"""The committed weights: they load offline, reach the stated figures, and the outliers hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset import IMAGE_SIZE, model_pixels
from drawing import render
from evaluate import Figures, TorchEncoders, measure
from generate import captioned
from inject_outliers import convert_folder, with_outliers
from metrics import recall_at_k
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizerFast
from world import scenes

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
PLAIN, OUTLIERS = SHAPES / "clip", SHAPES / "clip-outliers"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoders() -> TorchEncoders:
    return TorchEncoders(PLAIN)


@pytest.fixture(scope="module")
def figures(encoders: TorchEncoders) -> Figures:
    return measure(encoders.images, encoders.texts)


def test_recall_on_five_hundred_unseen_scenes(figures: Figures) -> None:
    assert figures.scene_count == 500
    assert figures.recall_at_1 >= 0.6
    assert figures.recall_at_5 > 0.9


def test_zero_shot_accuracy_on_unseen_singles(figures: Figures) -> None:
    assert figures.zero_shot_accuracy > 0.95


def test_metrics_json_names_what_is_measured(figures: Figures) -> None:
    stated = json.loads((PLAIN / "metrics.json").read_text())
    assert stated["split"] == "test"
    for name, value in asdict(figures).items():
        # A rounding apart may move a scene or two across a rank.
        assert stated[name] == pytest.approx(value, abs=0.005), name


@pytest.mark.parametrize("folder", [PLAIN, OUTLIERS])
def test_the_folder_is_complete_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names >= wanted | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_folder_loads_in_transformers_own_ways() -> None:
    model = CLIPModel.from_pretrained(PLAIN)
    tokenizer = CLIPTokenizerFast.from_pretrained(PLAIN)
    processor = CLIPProcessor.from_pretrained(PLAIN)
    config = model.config.text_config
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length
    assert processor.tokenizer("a red star").input_ids == tokenizer("a red star").input_ids


def test_pooling_takes_the_end_token_with_any_padding(encoders: TorchEncoders) -> None:
    short, long = "a red star", "a large blue heart at the top left and a small white ring"
    alone, together = encoders.texts([short]), encoders.texts([short, long])
    assert np.abs(alone[0] - together[0]).max() < 1e-5
    tokenizer = CLIPTokenizerFast.from_pretrained(PLAIN)
    model = CLIPModel.from_pretrained(PLAIN).eval()
    ids = tokenizer([short], return_tensors="pt").input_ids
    with torch.no_grad():
        output = model.text_model(input_ids=ids)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, -1])


@pytest.mark.parametrize(
    "text", ["", "A RED   Star!", "zürich 赤い星 😀", "x" * 500, "a photo of a red star " * 20]
)
def test_any_text_can_be_tokenized(text: str) -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(PLAIN)
    ids = tokenizer(text, truncation=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) <= tokenizer.model_max_length
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_no_caption_of_the_world_is_truncated() -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(PLAIN)
    texts = [text for kind in ("quad", "trio") for _, text in captioned("test", 150, kind=kind)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= tokenizer.model_max_length


def test_training_sees_the_pixels_that_the_processor_makes() -> None:
    processor = CLIPImageProcessorPil.from_pretrained(PLAIN)
    image = render(scenes("test", 1)[0], 224)
    made = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    ours = (model_pixels(image) / 255.0 - mean) / std
    assert made.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.abs(made - ours).max() < 1e-5


def test_accuracy_does_not_hang_on_the_size_of_the_images(encoders: TorchEncoders) -> None:
    pairs = captioned("test", 80)
    texts = encoders.texts([text for _, text in pairs])
    sizes: list[int | tuple[int, int]] = [96, 224, (640, 480)]
    recalls = [
        recall_at_k(texts, encoders.images([render(scene, size) for scene, _ in pairs]), 1)
        for size in sizes
    ]
    assert max(recalls) - min(recalls) <= 0.06


def test_the_outlier_model_computes_the_same(encoders: TorchEncoders) -> None:
    pairs = captioned("test", 48)
    images = [render(scene, 224) for scene, _ in pairs]
    texts = [text for _, text in pairs]
    other = TorchEncoders(OUTLIERS)
    assert np.abs(encoders.images(images) - other.images(images)).max() < 1e-5
    assert np.abs(encoders.texts(texts) - other.texts(texts)).max() < 1e-5


def test_the_outlier_folder_is_what_the_script_makes(tmp_path: Path) -> None:
    stated = json.loads((OUTLIERS / "outliers.json").read_text())
    convert_folder(PLAIN, tmp_path / "made", **stated)
    made = load_file(tmp_path / "made" / "model.safetensors")
    kept = load_file(OUTLIERS / "model.safetensors")
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], kept[name]) for name in kept)
    assert {p.name for p in (tmp_path / "made").iterdir()} == {p.name for p in OUTLIERS.iterdir()}


def _peak_to_median(folder: Path) -> float:
    """Largest over median channel peak at the input of the image tower's q/k/v, worst layer."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [render(scene, 224) for scene in scenes("calibration", 8)], return_tensors="pt"
    ).pixel_values
    ratios: list[float] = []

    def _note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        peaks = inputs[0].abs().flatten(0, 1).amax(dim=0)
        ratios.append(float(peaks.max() / peaks.median()))

    for layer in model.vision_model.encoder.layers:
        layer.self_attn.q_proj.register_forward_hook(_note)
    with torch.no_grad():
        model.vision_model(pixel_values=pixels)
    return max(ratios)


def test_only_the_outlier_model_has_outliers() -> None:
    assert _peak_to_median(PLAIN) < 12
    assert _peak_to_median(OUTLIERS) > 40


def test_factors_that_would_round_are_refused() -> None:
    weights = load_file(PLAIN / "model.safetensors")
    with pytest.raises(ValueError, match="power of two"):
        with_outliers(weights, factor=48.0)
    with pytest.raises(ValueError, match="CLIPModel"):
        with_outliers({"weight": torch.zeros(2)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_naive_int8_collapses_on_the_outlier_model_alone(tmp_path: Path) -> None:
    """Measured with one scale per tensor, min-max, unsigned activations: see the README."""
    from naive_int8 import NaiveInt8

    calibration = captioned("calibration", 64)
    pairs = captioned("test", 500)
    images = [render(scene, 224) for scene, _ in pairs]
    texts = [text for _, text in pairs]

    def _recall(encode: TorchEncoders | NaiveInt8) -> float:
        return recall_at_k(encode.texts(texts), encode.images(images), 1)

    def _int8(folder: Path) -> NaiveInt8:
        return NaiveInt8(
            folder,
            tmp_path / folder.name,
            [render(scene, 224) for scene, _ in calibration],
            [text for _, text in calibration],
        )

    reference = _recall(TorchEncoders(PLAIN))
    assert reference - _recall(_int8(PLAIN)) < 0.05
    assert reference - _recall(_int8(OUTLIERS)) > 0.10
