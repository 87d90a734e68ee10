"""Losses of distillation: distances of the student's embeddings from the teacher's."""

from __future__ import annotations

import torch
from torch.nn import functional

from mmedge.errors import QuantizationError, ShapeError

__all__ = ["contrastive_loss", "joint_embedding_loss"]


def joint_embedding_loss(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of paired embeddings, summed over the pairs.

    J = sum_i ||f(x_i) - g(y_i)||^2. With a student f and its teacher g of the same x it is the
    loss of embedding distillation (Romero et al. 2015, "FitNets", eq. 3, without a regressor); of
    L2-normalised embeddings each term is 2 (1 - cosine).

    Args:
        f: (B, D) float32.
        g: (B, D) float32; row i belongs to row i of f.

    Returns:
        () float32.

    Raises:
        ShapeError: If the shapes differ or are not (B, D).
    """
    _require_pairs(f, g)
    return (f - g).square().sum()


def contrastive_loss(z: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean InfoNCE loss of the pairs of a batch.

    l_i = -log(exp(sim(z_i, z'_i) / T) / sum_k exp(sim(z_i, z'_k) / T)), with sim the cosine:
    InfoNCE (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive
    Coding", eq. 4), with the temperature of Chen et al. 2020 ("SimCLR", eq. 1). The sum goes over
    the partners k of the other side, the right one among them.

    Args:
        z: (B, D) float32.
        other: (B, D) float32; row i is the partner of row i of z.
        temperature: T, positive.

    Returns:
        () float32; log B for indistinguishable embeddings.

    Raises:
        ShapeError: If the shapes differ or are not (B, D).
        QuantizationError: If the temperature is not positive.
    """
    _require_pairs(z, other)
    if not temperature > 0:
        raise QuantizationError(
            f"temperature: got {temperature}, expected a positive number such as 0.07."
        )
    similarity = functional.normalize(z, dim=-1) @ functional.normalize(other, dim=-1).T
    partners = torch.arange(z.shape[0], device=z.device)
    return functional.cross_entropy(similarity / temperature, partners)


def _require_pairs(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.ndim != 2 or one.shape != other.shape:
        raise ShapeError(
            f"Paired embeddings: got {tuple(one.shape)} and {tuple(other.shape)}, expected twice "
            "the same (B, D). Embed the same samples in both."
        )
