"""One row of a generation: its tokens, the choice of the next, and its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mmedge.generation.constraint import Matcher
from mmedge.generation.logits import filtered, log_softmax, penalized
from mmedge.generation.options import GenerationOptions
from mmedge.generation.texts import Decode, TextBuilder
from mmedge.specs import Float32Array

__all__ = ["Completion", "Finish", "Row"]

Finish: TypeAlias = Literal["end", "stop", "length", "cancelled"]
"""Why a text ended: the model's end token, a stop text or id, its largest length, or the caller."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text.

    Attributes:
        text: Without the prompt, special tokens and the stop text.
        tokens: The new ids, with the one that ended the text.
        finish: Why it ended.
        prompt_tokens: Number of ids in the prompt.
        log_probabilities: Of each new token, where they were requested.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    log_probabilities: tuple[float, ...] | None = None


class Row:
    """A row of a batch that is being generated.

    Args:
        prompt: Its token ids.
        options: Settings.
        eos_ids: Tokens that end it.
        position: Its number in the batch; rows draw different numbers from one seed.
        decode: Of the tokenizer; None leaves the text empty.
        matcher: Of the constraint; None for none.

    Attributes:
        made: Its new tokens.
        finish: Why it ended; None while it goes on.
        piece: Text that the last token added.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        eos_ids: Collection[int],
        *,
        position: int = 0,
        decode: Decode | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.made: list[int] = []
        self.finish: Finish | None = None
        self.piece = ""
        self._options = options
        self._eos_ids = frozenset(eos_ids)
        self._matcher = matcher
        self._builder = None if decode is None else TextBuilder(decode, options.stop)
        self._likelihoods: list[float] = []
        seed = np.random.SeedSequence(options.seed, spawn_key=(position,))
        self._draws = np.random.default_rng(seed)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.finish is not None

    def take(self, logits: Float32Array) -> int:
        """Choose the next token from logits (V,), add it and return it."""
        options = self._options
        scores = penalized(self.prompt, self.made, logits, options)
        if self._matcher is not None:
            scores = self._matcher.allowed(scores)
        if options.samples:
            # The largest of logits and Gumbel noise is a draw from their distribution.
            noise = self._draws.gumbel(size=len(scores))
            token = int((filtered(scores, options) + noise).argmax())
        else:
            token = int(scores.argmax())
        if options.log_probabilities:
            self._likelihoods.append(float(log_softmax(logits)[token]))
        self.add(token)
        return token

    def add(self, token: int) -> None:
        """Add a token, and end the row where it does."""
        self.made.append(token)
        self.piece = "" if self._builder is None else self._builder.add(token)
        if self._matcher is not None:
            self._matcher.accept(token)
        if token in self._eos_ids:
            self.end("end")
        elif token in self._options.stop_ids or (self._builder and self._builder.stopped):
            self.end("stop")
        elif self._matcher is not None and self._matcher.done:
            self.end("end")
        elif len(self.made) >= self._options.most:
            self.end("length")

    def end(self, finish: Finish) -> None:
        """End the row, with the text that was held back."""
        self.finish = finish
        if self._builder is not None:
            self.piece += self._builder.finish()

    def completion(self) -> Completion:
        """Return what was generated."""
        return Completion(
            text="" if self._builder is None else self._builder.text,
            tokens=tuple(self.made),
            finish=self.finish or "cancelled",
            prompt_tokens=len(self.prompt),
            log_probabilities=tuple(self._likelihoods) if self._options.log_probabilities else None,
        )
