"""Beam search, as transformers does it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mmedge.generation.decoding import Decoding
from mmedge.generation.logits import log_softmax, penalized
from mmedge.generation.loop import prefill
from mmedge.generation.options import GenerationOptions
from mmedge.specs import Array, Float32Array

__all__ = ["beam_search"]

_NEVER = -1e9


class _Beams:
    """The hypotheses of one prompt."""

    def __init__(
        self, prompt: Sequence[int], options: GenerationOptions, ends: Collection[int]
    ) -> None:
        self.prompt, self.options, self.ends = list(prompt), options, frozenset(ends)
        self.running: list[list[int]] = [[] for _ in range(options.beams)]
        self.scores = np.full(options.beams, _NEVER, np.float32)
        self.scores[0] = 0  # all begin alike
        self.finished: list[tuple[float, list[int]]] = []
        self.open = True

    def advance(self, logits: Float32Array) -> list[int]:
        """Take the logits (beams, V) of one step; return the beam that each new one continues."""
        width = self.options.beams
        chances = np.stack(
            [
                penalized(self.prompt, made, log_softmax(one), self.options)
                for made, one in zip(self.running, logits, strict=True)
            ]
        )
        total = np.asarray(chances + self.scores[:, None], np.float32).ravel()
        kept = min(max(2, 1 + len(self.ends)) * width, len(total))
        best = np.argpartition(-total, kept - 1)[:kept]
        best = best[np.argsort(-total[best], kind="stable")]
        vocabulary = chances.shape[1]
        following: list[tuple[float, int, list[int]]] = []
        for rank, at in enumerate(best):
            beam, token = divmod(int(at), vocabulary)
            made = [*self.running[beam], token]
            if token in self.ends or len(made) >= self.options.most:
                if rank < width and self.open:
                    self._finish(float(total[at]), made)
                following.append((float(total[at]) + _NEVER, beam, made))
            else:
                following.append((float(total[at]), beam, made))
        following.sort(key=lambda one: -one[0])
        self.running = [made for _, _, made in following[:width]]
        self.scores = np.array([score for score, _, _ in following[:width]], np.float32)
        self._close()
        return [beam for _, beam, _ in following[:width]]

    def _finish(self, score: float, made: list[int]) -> None:
        self.finished.append((score / len(made) ** self.options.length_penalty, made))
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self.options.beams :]

    def _close(self) -> None:
        """End the search where no running beam can be better than a finished one."""
        length = len(self.running[0])
        best = self.scores[0] / length**self.options.length_penalty
        full = len(self.finished) == self.options.beams
        if length >= self.options.most or (full and best <= self.finished[-1][0]):
            self.open = False


def beam_search(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    eos_ids: Collection[int],
    pad_id: int = 0,
) -> list[list[int]]:
    """Return the best new tokens of each prompt, with the one that ends them.

    Args:
        decoding: A row for each prompt. What its state holds is the beginning of every prompt.
        prompts: Token ids.
        options: Settings.
        eos_ids: Tokens that end a text.
        pad_id: Pads prompts.

    Raises:
        InputError: If the state is full.
        BackendError: If the session fails.
    """
    width = options.beams
    logits = prefill(decoding, prompts, pad_id)
    decoding.reorder(np.repeat(np.arange(len(prompts)), width))
    logits = np.repeat(logits, width, axis=0)
    ends = {*eos_ids, *options.stop_ids}
    groups = [_Beams(prompt, options, ends) for prompt in prompts]
    while True:
        rows: list[int] = []
        for at, group in enumerate(groups):
            begin = at * width
            one: Array = logits[begin : begin + width]
            sources = group.advance(one) if group.open else list(range(width))
            rows += [begin + source for source in sources]
        cancelled = options.cancelled is not None and options.cancelled()
        if cancelled or not any(group.open for group in groups):
            return [
                group.finished[0][1] if group.finished else group.running[0] for group in groups
            ]
        decoding.reorder(np.array(rows, np.int64))
        last = [[made[-1]] for group in groups for made in group.running]
        logits = decoding.step(np.array(last, np.int64))[:, -1]
