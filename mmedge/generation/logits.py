"""Logits of one row: penalties, filters, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from mmedge.generation.options import GenerationOptions
from mmedge.specs import Float32Array

__all__ = ["LogitsProcessor", "filtered", "log_softmax", "penalized"]

LogitsProcessor: TypeAlias = Callable[[Sequence[int], Sequence[int], Float32Array], Float32Array]
"""Takes a row's prompt, its new tokens and the logits (V,) float32 of the next one; returns the
logits to choose from."""


def log_softmax(logits: Float32Array) -> Float32Array:
    """Return log-probabilities (..., V) of logits (..., V)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def penalized(
    prompt: Sequence[int], made: Sequence[int], logits: Float32Array, options: GenerationOptions
) -> Float32Array:
    """Return the logits (V,) after penalties and the caller's processors."""
    changed = logits
    if options.repetition_penalty != 1:
        changed, seen = changed.copy(), np.unique(np.array([*prompt, *made], np.int64))
        scores = changed[seen]
        scale = np.where(scores > 0, 1 / options.repetition_penalty, options.repetition_penalty)
        changed[seen] = scores * scale
    if options.frequency_penalty and made:
        changed = changed.copy()
        seen, counts = np.unique(np.array(made, np.int64), return_counts=True)
        changed[seen] -= options.frequency_penalty * counts
    for processor in options.processors:
        changed = np.asarray(processor(prompt, made, changed), np.float32)
    return changed


def filtered(logits: Float32Array, options: GenerationOptions) -> Float32Array:
    """Return logits (V,) over the temperature, -inf where a token is not drawn from."""
    scores = np.asarray(logits / np.float32(options.temperature), np.float32)
    if 0 < options.top_k < len(scores):
        least = np.partition(scores, -options.top_k)[-options.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    if options.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        chances = np.exp(log_softmax(scores[order]))
        # What comes before a token is less than top_p: the most likely one always stays.
        beyond = np.cumsum(chances) - chances >= options.top_p
        beyond[0] = False
        scores = scores.copy()
        scores[order[beyond]] = -np.inf
    if options.min_p:
        least = scores.max() + np.log(np.float32(options.min_p))
        scores = np.where(scores < least, -np.inf, scores)
    return np.asarray(scores, np.float32)
