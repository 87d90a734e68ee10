"""Classification: probabilities of labels from similarities or logits."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.errors import InputError
from mmedge.models.running import Made
from mmedge.postprocess.scores import sigmoid
from mmedge.specs import Array, Float32Array

__all__ = [
    "DEFAULT_TEMPLATE",
    "Classification",
    "EmbeddingCache",
    "ScoredLabel",
    "activate",
    "label_prompts",
    "probabilities",
]

DEFAULT_TEMPLATE = "a photo of a {}"
_LABEL_SETS = 8  # label sets with cached embeddings


class ScoredLabel(NamedTuple):
    """A label and its probability for an image."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Labels and their probabilities for N images.

    Attributes:
        labels: L labels, in the order they were given, or the checkpoint's own.
        probabilities: (N, L) float32. Each row sums to 1 where the model was trained with softmax
            (CLIP, most classifiers); each entry stands alone where it was trained with sigmoid
            (SigLIP, classifiers of several labels an image).
    """

    labels: tuple[str, ...]
    probabilities: Float32Array

    def top(self, k: int = 1) -> list[list[ScoredLabel]]:
        """Return the k most probable labels of every image, best first.

        Args:
            k: Labels per image, at least 1; all of them if there are fewer.

        Raises:
            InputError: If k is below 1.
        """
        if k < 1:
            raise InputError(f"k: got {k}, expected 1 or more.")
        # A stable sort keeps equal probabilities in label order.
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [ScoredLabel(self.labels[i], float(row[i])) for i in best]
            for row, best in zip(self.probabilities, order, strict=True)
        ]

    def named(self, images: Sequence[object], k: int) -> Made:
        """Return the k most probable labels of every image, with its name, for `mmedge run`."""
        rows = [
            {"input": str(image), "label": label, "probability": probability}
            for image, best in zip(images, self.top(k), strict=True)
            for label, probability in best
        ]
        return Made(rows, {"probabilities": self.probabilities})


class EmbeddingCache:
    """Embeddings of the last 8 sets of prompts. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._embeddings: OrderedDict[tuple[str, ...], Float32Array] = OrderedDict()

    def get(
        self, prompts: tuple[str, ...], encode: Callable[[tuple[str, ...]], Float32Array]
    ) -> Float32Array:
        """Return the embeddings of prompts, (L, D) float32, encoded unless cached."""
        with self._lock:
            cached = self._embeddings.get(prompts)
            if cached is not None:
                self._embeddings.move_to_end(prompts)
                return cached
        # Encoded outside the lock: two threads may do it twice, but neither waits for the other.
        embeddings = encode(prompts)
        with self._lock:
            self._embeddings[prompts] = embeddings
            while len(self._embeddings) > _LABEL_SETS:
                self._embeddings.popitem(last=False)
        return embeddings


def label_prompts(labels: Sequence[str], template: str) -> tuple[str, ...]:
    """Return the template with "{}" replaced by each label.

    Raises:
        InputError: If there is no label, one is given twice or is not a str, or the template has
            no "{}".
    """
    if "{}" not in template:
        raise InputError(
            f"Template '{template}' has no placeholder for the label. Put {{}} there, as in "
            f"'{DEFAULT_TEMPLATE}'; '{{}}' alone passes the labels as they are."
        )
    if not labels:
        raise InputError("Labels: got none, expected at least one.")
    for position, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"Label {position}: got {label!r}, expected a text that is not empty.")
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        raise InputError(f"Labels given more than once: {repeated}. Give each label once.")
    return tuple(template.replace("{}", label) for label in labels)


def probabilities(similarities: Float32Array, head: ContrastiveHead) -> Float32Array:
    """Turn cosine similarities into probabilities.

    Args:
        similarities: (N, L) float32.
        head: The model's scale, bias and activation.

    Returns:
        (N, L) float32.
    """
    # float64: a scale of 100 magnifies the rounding, and there are few entries.
    return activate(
        similarities.astype(np.float64) * head.logit_scale + head.logit_bias, head.activation
    )


def activate(logits: Array, activation: Literal["softmax", "sigmoid"]) -> Float32Array:
    """Turn logits (N, L) into probabilities (N, L) float32."""
    logits = logits.astype(np.float64, copy=False)
    if activation == "sigmoid":
        scores = sigmoid(logits)
    else:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
    return scores.astype(np.float32)
