"""AdamW on float32 weights whose bfloat16 copies do the arithmetic, averaged over workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter
from workers import average_gradients


class Optimiser:
    """Float32 parameters, the copies that gradients are of, and AdamW."""

    def __init__(
        self, masters: Sequence[Parameter], twins: Sequence[Parameter], learning_rate: float
    ) -> None:
        """Set up training.

        Args:
            masters: Parameters in float32.
            twins: Of each, the parameter that the passes use: a copy, or the master itself.
            learning_rate: Until ``set_rate``.
        """
        self._pairs = list(zip(masters, twins, strict=True))
        self._masters = list(masters)
        plain = [p for p in masters if p.ndim < 2]
        decayed = [p for p in masters if p.ndim >= 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.98),
        )

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = rate

    def refresh(self) -> None:
        """Copy the float32 weights to the twins."""
        with torch.no_grad():
            for master, twin in self._pairs:
                if twin is not master:
                    twin.copy_(master)

    def apply(self) -> None:
        """Average the gradients over all workers, and make a step; ``refresh`` is the caller's."""
        for master, twin in self._pairs:
            if twin is not master and twin.grad is not None:
                master.grad, twin.grad = twin.grad.float(), None
        average_gradients(self._masters)
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self.adam.step()
        self.adam.zero_grad()
