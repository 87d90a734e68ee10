"""Evaluation of generators: next-token agreement with fp32, and log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.evaluation.base import Collected, Evaluation, Metric
from mmedge.converters.evaluation.bootstrap import mean_figures
from mmedge.converters.families.base import RoleSpec
from mmedge.specs import Array, Float32Array

__all__ = ["Generation"]

TOKENS, LIKELIHOODS = "tokens", "log_likelihoods"

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "token-agreement": Metric(
            "token_agreement", "share of positions with fp32's next token", agreement=True
        ),
        "log-likelihood": Metric(
            "log_likelihood",
            "mean log-probability of a held-out token, -ln(perplexity)",
            agreement=False,
            needs="texts that are not synthetic",
        ),
    }
)


class Generation(Evaluation):
    """Every position of a text predicts the next token, with the text itself before it."""

    metrics = METRICS

    def default_metric(self) -> str:
        """Return token-agreement."""
        return "token-agreement"

    def available(self) -> tuple[str, ...]:
        """Return both metrics; only token-agreement on synthetic texts."""
        return tuple(self.metrics)[: 1 if self.subject.data is None else 2]

    def collect(
        self,
        spec: RoleSpec,  # noqa: ARG002, there is one role
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        feeds: Iterable[Mapping[str, Array]],
        advance: Callable[[], None],
        reference: Mapping[str, Collected],  # noqa: ARG002
    ) -> dict[str, Array]:
        """Collect each position's most likely next token, and the real one's log-probability."""
        tokens: list[Array] = []
        likelihoods: list[Array] = []
        for feed in feeds:
            logits = np.asarray(run(feed)["logits"], np.float32)
            real = feed["attention_mask"] != 0
            tokens.append(logits.argmax(axis=-1)[real])
            likelihoods.append(_likelihoods(logits[:, :-1], feed["input_ids"][:, 1:])[real[:, 1:]])
            advance()
        return {TOKENS: np.concatenate(tokens), LIKELIHOODS: np.concatenate(likelihoods)}

    def quality(
        self,
        role: str,
        spec: RoleSpec,
        reference: Mapping[str, Collected],
        candidate: Collected,
    ) -> Quality:
        """Compare a variant with fp32, position by position."""
        fp32 = reference[role]
        agree = np.asarray(fp32[TOKENS] == candidate[TOKENS], np.float64)
        rows = {"token_agreement": agree}
        drops: dict[str, Figure] = {}
        if "log-likelihood" in self.available() and len(candidate[LIKELIHOODS]):
            lost = fp32[LIKELIHOODS].astype(np.float64) - candidate[LIKELIHOODS]
            drops = mean_figures({"log_likelihood": lost})
        figures = mean_figures(rows)
        if drops:
            figures |= mean_figures({"log_likelihood": candidate[LIKELIHOODS].astype(np.float64)})
        return Quality(figures=figures, drops=drops, samples=len(agree), data=self.about(spec))


def _likelihoods(logits: Float32Array, following: Array) -> Float32Array:
    """Return the log-probability (B, T) of the tokens that follow, from logits (B, T, V)."""
    largest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]
    chosen = np.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return np.asarray(chosen - total, np.float32)
