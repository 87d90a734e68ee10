"""Penalties and filters are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from mmedge.generation.logits import filtered, log_softmax, penalized
from mmedge.generation.options import GenerationOptions
from mmedge.specs import Float32Array

LOGITS = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)


def warped(logits: Float32Array, *warpers: Any) -> Float32Array:
    scores = torch.tensor(logits)[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
    return scores[0].numpy()


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 7}, [reference.TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [reference.TopPLogitsWarper(0.8)]),
        ({"top_p": 0.01}, [reference.TopPLogitsWarper(0.01)]),
        ({"min_p": 0.1}, [reference.MinPLogitsWarper(0.1)]),
        (
            {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                reference.TopKLogitsWarper(20),
                reference.TopPLogitsWarper(0.9),
                reference.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_filters(options: dict[str, Any], warpers: list[Any], temperature: float) -> None:
    settings = GenerationOptions(temperature=temperature, **options)
    expected = warped(LOGITS, reference.TemperatureLogitsWarper(temperature), *warpers)
    np.testing.assert_allclose(filtered(LOGITS, settings), expected, rtol=1e-6)
    assert np.isfinite(expected).sum() < len(LOGITS)


def test_a_repeated_token_is_less_likely() -> None:
    settings = GenerationOptions(repetition_penalty=1.4)
    processor = reference.RepetitionPenaltyLogitsProcessor(1.4)
    expected = processor(torch.tensor([[3, 5, 5, 8]]), torch.tensor(LOGITS)[None])[0]
    got = penalized([3, 5], [5, 8], LOGITS, settings)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_a_frequent_token_is_less_likely() -> None:
    got = penalized([3], [5, 5, 8], LOGITS, GenerationOptions(frequency_penalty=0.5))
    changed = {5: 1.0, 8: 0.5}
    expected = [value - changed.get(at, 0) for at, value in enumerate(LOGITS.tolist())]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert LOGITS[5] != got[5]  # and the model's own logits stay


def test_log_probabilities() -> None:
    expected = torch.log_softmax(torch.tensor(LOGITS), -1).numpy()
    np.testing.assert_allclose(log_softmax(LOGITS), expected, atol=1e-5)
    huge = np.array([1e38, -1e38], np.float32)
    np.testing.assert_array_equal(log_softmax(huge)[0], np.float32(0))
