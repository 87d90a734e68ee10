"""Fusion heads in PyTorch: on attention, on features, and on decisions."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

__all__ = ["AttentionFusion", "DecisionFusion", "FeatureFusion"]

_MASKED = -1e4  # finite in half precision


class AttentionFusion(nn.Module):
    """Phrases of a text attend to patches of an image; what they find is compared.

    softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017), twice: each of `phrases` learned queries
    gathers its words from the tokens, and with what it found its place from the patches. One more
    query gathers what is said of the phrases. Training may supervise where phrases look (`map`);
    without that, this head does not learn relations in reasonable time.

    Args:
        patches: Number of patches.
        patch_width: Width of a patch.
        token_width: Width of a token.
        classes: Number of scores.
        phrases: Phrases of a text that name a place.
        width: Width inside.
    """

    def __init__(
        self,
        patches: int,
        patch_width: int,
        token_width: int,
        classes: int,
        phrases: int = 2,
        width: int = 128,
    ) -> None:
        super().__init__()
        self.width = width
        self.words = nn.Sequential(nn.LayerNorm(token_width), nn.Linear(token_width, width))
        self.look = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.phrases = nn.Parameter(torch.randn(phrases + 1, width) / width**0.5)
        self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.place = nn.Parameter(torch.randn(patches, width) * 0.1)
        self.out = nn.Sequential(
            nn.Linear((phrases + 1) * width, width), nn.GELU(), nn.Linear(width, classes)
        )

    def forward(
        self, patches: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores (B, C), and where each phrase looks (B, phrases, P).

        Args:
            patches: (B, P, patch_width).
            tokens: (B, S, token_width).
            mask: (B, S) bool, which tokens count.
        """
        words = self.words(tokens)
        read = self.phrases @ words.transpose(1, 2) / self.width**0.5
        read = torch.where(mask[:, None], read, torch.full_like(read, _MASKED))
        said = torch.softmax(read * 4, -1) @ words  # (B, phrases + 1, width)
        seen = self.look(patches)
        scores = self.query(said[:, 1:]) @ self.key(seen).transpose(1, 2) / self.width**0.5
        attention = torch.softmax(scores, -1)
        found = attention @ (self.value(seen) + self.place)
        joined = torch.cat([said[:, :1], found], 1).flatten(1)
        return self.out(joined), attention


class FeatureFusion(nn.Module):
    """z = W_v v + W_t t at each place, a non-linearity, the largest over the places.

    The sum alone is additive in image and text, so that a linear layer on it cannot let the text
    choose what of the image counts; the GELU between them makes it.

    Args:
        image_width: Width of v.
        text_width: Width of t.
        classes: Number of scores.
        width: Width inside.
    """

    def __init__(self, image_width: int, text_width: int, classes: int, width: int = 256) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
        self.text = nn.Linear(text_width, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, C).

        Args:
            image: (B, P, image_width) patches, or (B, image_width) an embedding.
            text: (B, text_width) embedding.
        """
        places = image if image.ndim == 3 else image[:, None]
        joined = functional.gelu(self.image(places) + self.text(text)[:, None])
        mixed = functional.gelu(self.mix(joined)).amax(1)
        return cast(torch.Tensor, self.out(mixed))


class DecisionFusion(nn.Module):
    """Product of experts: sum over the sensors that are there of log softmax(logits / temperature).

    With experts whose errors are independent given the class this is Bayes' rule (Hinton, 2002);
    temperatures fitted on held-out decisions (Guo et al., 2017) make an overconfident sensor count
    as much as it is right.

    Args:
        temperatures: (M,), one a sensor.
    """

    temperatures: torch.Tensor

    def __init__(self, temperatures: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("temperatures", temperatures)

    def forward(self, decisions: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return log probabilities (B, C).

        Args:
            decisions: (B, M, C) logits of the sensors.
            present: (B, M) bool: which are there.
        """
        each = torch.log_softmax(decisions / self.temperatures[:, None], -1)
        kept = torch.where(present[:, :, None], each, torch.zeros_like(each))
        return torch.log_softmax(kept.sum(1), -1)
