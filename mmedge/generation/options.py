"""Settings of a generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmedge.errors import InputError

if TYPE_CHECKING:
    from mmedge.generation.constraint import Constraint
    from mmedge.generation.logits import LogitsProcessor

__all__ = ["DEFAULT_NEW_TOKENS", "GenerationOptions"]

DEFAULT_NEW_TOKENS = 128
_WHOLE = {"top_k", "beams", "lookup"}
_LEAST_TEMPERATURE = 1e-6  # logits over less are infinite in float32

_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 24),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-100, 100),
    "beams": (1, 64),
    "length_penalty": (-100, 100),
    "lookup": (0, 64),
}


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Settings of a generation. The defaults are greedy.

    Attributes:
        max_new_tokens: Largest number of new tokens; None for 128, or fewer where the model's
            length leaves fewer.
        temperature: 0 takes the most likely token; above it, tokens are drawn from the
            distribution of logits / temperature.
        top_k: Draw from the k most likely tokens; 0 for all.
        top_p: Draw from the most likely tokens that together have this probability.
        min_p: Draw from tokens of at least this share of the most likely one's probability.
        repetition_penalty: Divides the positive logits of tokens in the prompt and the new text,
            and multiplies the negative ones; 1 for none.
        frequency_penalty: Subtracted from a token's logit for each time it is in the new text.
        seed: Of the draws: the same seed and prompts give the same tokens. None draws a new one.
        beams: Above 1, beam search with this width.
        length_penalty: Beam search divides a text's score by its length to this power.
        stop: Texts that end the generation and are left out, wherever tokens begin and end.
        stop_ids: Tokens that end the generation, beside the model's own.
        lookup: Prompt-lookup decoding: guess up to this many tokens at once from what followed the
            same words before, and keep those that the model would have taken. 0 for none.
        log_probabilities: Return the log-probability of each new token, under the logits as the
            model gives them.
        processors: Change the logits before each choice, after the penalties.
        constraint: What the text must match, see Constraint.
        cancelled: Asked before each token; True ends the generation.

    Raises:
        InputError: If a number is out of range, or settings exclude each other.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    lookup: int = 0
    log_probabilities: bool = False
    processors: tuple[LogitsProcessor, ...] = ()
    constraint: Constraint | None = None
    cancelled: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            got = getattr(self, name)
            kinds = (int, "a whole number") if name in _WHOLE else (int | float, "a number")
            if isinstance(got, bool) or not isinstance(got, kinds[0]) or not low <= got <= high:
                raise InputError(f"{name}: got {got!r}, expected {kinds[1]} from {low} to {high}.")
        new = self.max_new_tokens
        if new is not None and (isinstance(new, bool) or not isinstance(new, int) or new < 1):
            raise InputError(f"max_new_tokens: got {new!r}, expected 1 or more, or None.")
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise InputError(
                f"temperature: got {self.temperature}, expected 0, or {_LEAST_TEMPERATURE} to 100."
            )
        texts = type(self.stop) is tuple and all(type(text) is str and text for text in self.stop)
        if not texts:
            raise InputError(f"stop: got {self.stop!r}, expected a tuple of texts, none empty.")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise InputError(f"seed: got {seed!r}, expected 0 or more, or None.")
        greedy = ("temperature", "lookup", "stop", "constraint", "log_probabilities")
        used = [name for name in greedy if getattr(self, name)]
        if self.beams > 1 and used:
            raise InputError(
                f"beams: got {self.beams} with {used[0]}; beam search does not take it."
            )

    @property
    def most(self) -> int:
        """Largest number of new tokens."""
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0
