"""Synthetic image vectors and queries with a modality gap.

Model, per unit of latent length: a point is a cluster centre (weight 0.8) plus its own part (0.6),
both Gaussian in a 96-dimensional subspace of D; cluster sizes follow a Zipf law with exponent 0.7.
An image vector is normalise(0.9 g_image + point + 0.25 isotropic noise). Image queries are further
points of the same clusters. A text query takes the point of one stored image with weight 0.5, its
coordinates reweighted (log-normal, sigma 0.7, the same for all texts: captions stress some things),
adds latent noise (0.5) and isotropic noise (0.25), and sits around g_text + 0.5 of a fixed latent
direction instead, with g_text orthogonal to g_image: the gap, and texts crowd on one side of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmedge.specs import Array, Float32Array

__all__ = ["Data", "generate"]

_LATENT = 96


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Stored vectors (N, D) and queries (Q, D) by kind, float32 and L2-normalised."""

    vectors: Float32Array
    queries: dict[str, Float32Array]


def generate(count: int, dim: int = 512, queries: int = 400, seed: int = 0) -> Data:
    """Draw a data set; the same arguments give the same one.

    Args:
        count: N, stored image vectors.
        dim: D.
        queries: Q of each kind.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((dim, _LATENT + 2)))
    g_image, g_text, latent = basis[:, 0], basis[:, 1], basis[:, 2:].T.astype(np.float32)
    clusters = max(20, count // 200)
    weights = np.arange(1, clusters + 1) ** -0.7
    weights /= weights.sum()
    centres = _gauss(rng, clusters, _LATENT)

    def points(members: int) -> Float32Array:
        which = rng.choice(clusters, members, p=weights)
        return 0.8 * centres[which] + 0.6 * _gauss(rng, members, _LATENT)

    vectors = np.empty((count, dim), np.float32)
    targets = np.sort(rng.choice(count, queries, replace=False))
    target_points = np.empty((queries, _LATENT), np.float32)
    for start in range(0, count, 65_536):
        stop = min(count, start + 65_536)
        block = points(stop - start)
        inside = (targets >= start) & (targets < stop)
        target_points[inside] = block[targets[inside] - start]
        vectors[start:stop] = _placed(rng, block, latent, 0.9 * g_image)
    stress = np.exp(0.7 * rng.standard_normal(_LATENT)).astype(np.float32)
    texts = 0.5 * target_points * stress + 0.5 * _gauss(rng, queries, _LATENT)
    texts += 0.5 * _gauss(rng, 1, _LATENT)
    return Data(
        vectors,
        {
            "image": _placed(rng, points(queries), latent, 0.9 * g_image),
            "text": _placed(rng, texts, latent, 0.9 * g_text),
        },
    )


def _gauss(rng: np.random.Generator, count: int, dim: int) -> Float32Array:
    """Return Gaussian vectors of mean squared length 1, (count, dim) float32."""
    return rng.standard_normal((count, dim), np.float32) / np.float32(np.sqrt(dim))


def _placed(
    rng: np.random.Generator, points: Float32Array, latent: Float32Array, around: Array
) -> Float32Array:
    vectors = points @ latent + around.astype(np.float32)
    vectors += 0.25 * _gauss(rng, len(points), len(around))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)
