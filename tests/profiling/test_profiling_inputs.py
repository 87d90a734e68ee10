"""What is fed: true lengths, tiled batches, a frame that decodes like a photo."""

from __future__ import annotations

import io

import numpy as np
import pytest
from bundles import VOCABULARY, edit_manifest
from PIL import Image

from mmedge.bundle import Bundle, open_bundle
from mmedge.bundle.tensors import CallerFeed
from mmedge.errors import ProfileError
from mmedge.profiling.inputs import TEXT, Inputs, frame_jpeg, sample_of, text_config


def test_the_frame_is_always_the_same_and_as_large_as_a_cameras() -> None:
    jpeg = frame_jpeg()
    assert jpeg == frame_jpeg()
    assert Image.open(io.BytesIO(jpeg)).size == (1280, 720)
    assert 100_000 < len(jpeg) < 400_000


def test_golden_inputs_are_repeated_up_to_the_batch(tiny_bundle: Bundle) -> None:
    inputs = Inputs.of(tiny_bundle)
    golden = inputs.golden.inputs["image_encoder"]["pixel_values"]
    feed = inputs.feed("image_encoder", 5, None)["pixel_values"]
    np.testing.assert_array_equal(feed, golden[[0, 1, 0, 1, 0]])
    assert feed.flags.c_contiguous
    assert inputs.feed("image_encoder", 1, None)["pixel_values"].shape[0] == 1


def test_texts_are_measured_at_their_true_length_and_at_the_longest(tiny_bundle: Bundle) -> None:
    inputs = Inputs.of(tiny_bundle)
    # Golden texts have 4 and 3 tokens, the second padded to 4.
    assert inputs.sequences("text_encoder", ("golden", "max")) == (4, 6)
    assert inputs.sequences("text_encoder", (5, "max", 6)) == (5, 6)
    assert inputs.sequences("image_encoder", ("golden", "max")) == (None,)


def test_where_the_closing_token_pads_the_first_of_them_still_counts(tiny_bundle: Bundle) -> None:
    closing = VOCABULARY["</s>"]
    edit_manifest(tiny_bundle.path, "processors", "text", "pad_id", value=closing)
    inputs = Inputs.of(open_bundle(tiny_bundle.path))
    rows = np.array([[1, 5, closing, closing, closing, closing]], np.int64)
    padded = Inputs(
        inputs.bundle, inputs.golden.__class__({"text_encoder": {"input_ids": rows}}, {})
    )
    assert padded.sequences("text_encoder", ("golden",)) == (3,)


@pytest.mark.parametrize("sequence", [1, 2, 5, 6])
def test_a_text_of_any_length_ends_with_the_closing_token(
    tiny_bundle: Bundle, sequence: int
) -> None:
    ids = Inputs.of(tiny_bundle).feed("text_encoder", 3, sequence)["input_ids"]
    assert ids.shape == (3, sequence)
    assert ids.dtype == np.int64
    assert (ids[:, -1] == VOCABULARY["</s>"]).all()
    assert (ids != VOCABULARY["<pad>"]).all()


def test_a_model_that_always_pads_is_measured_at_that_length_alone(tiny_bundle: Bundle) -> None:
    edit_manifest(tiny_bundle.path, "processors", "text", "padding", value="max_length")
    inputs = Inputs.of(open_bundle(tiny_bundle.path))
    assert inputs.sequences("text_encoder", ("golden", "max", 6)) == (6,)
    assert inputs.feed("text_encoder", 2, 6)["input_ids"].shape == (2, 6)
    with pytest.raises(ProfileError, match="takes exactly 6 tokens"):
        inputs.sequences("text_encoder", (5,))


def test_a_length_beyond_the_models_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(ProfileError, match="--sequence 7: text_encoder takes at most 6"):
        Inputs.of(tiny_bundle).sequences("text_encoder", (7,))


def test_roles_that_no_processor_feeds_take_their_golden_inputs(tiny_bundle: Bundle) -> None:
    assert isinstance(sample_of(tiny_bundle, "image_encoder"), bytes)
    assert sample_of(tiny_bundle, "text_encoder") == TEXT
    assert text_config(tiny_bundle, "image_encoder") is None
    assert text_config(tiny_bundle, "text_encoder") == tiny_bundle.manifest.processors["text"]
    role = tiny_bundle.manifest.roles["text_encoder"]
    given = role.inputs[0].model_copy(update={"feed": CallerFeed()})
    free = role.model_copy(update={"inputs": (given,)})
    manifest = tiny_bundle.manifest.model_copy(update={"roles": {"text_encoder": free}})
    inputs = Inputs.of(Bundle(tiny_bundle.path, manifest))
    assert sample_of(inputs.bundle, "text_encoder") is None
    assert inputs.sequences("text_encoder", ("golden", "max")) == (None,)
    assert inputs.feed("text_encoder", 3, None)["input_ids"].shape == (3, 4)
