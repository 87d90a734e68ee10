"""What `mmedge run` gives a model and gets from it; a kind says what it can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from mmedge.errors import InputError
from mmedge.specs import Array

__all__ = ["Given", "Made", "Run", "Settings", "chosen_run"]


@dataclass(frozen=True, slots=True)
class Given:
    """Inputs of one run.

    Attributes:
        images: Image files.
        texts: Texts: to embed, or labels, or prompts, as the run says.
        audio: Audio files.
        videos: Video files.
        arrays: Arrays by input of the graph.
    """

    images: Sequence[Path] = ()
    texts: Sequence[str] = ()
    audio: Sequence[Path] = ()
    videos: Sequence[Path] = ()
    arrays: Mapping[str, Array] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Which of them are there."""
        return frozenset(each.name for each in fields(self) if getattr(self, each.name))


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run.

    Attributes:
        k: Labels an image, at most.
        threshold: Score from which on a detection is returned; None for the model's own.
        max_new_tokens: Length of a generated text, at most; None for the model's usual.
    """

    k: int = 5
    threshold: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """Results of one run.

    Attributes:
        rows: One result each, by column; equal columns in all.
        arrays: The same as arrays, by name.
    """

    rows: Sequence[Mapping[str, object]]
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Something that a model can do with inputs.

    Attributes:
        call: Does it.
        needs: Fields of Given that it cannot do without; none if any of `takes` will do.
        takes: All fields of Given that it uses.
        stream: Yields its text as it comes; None where it has none.
    """

    call: Callable[[Given, Settings], Made]
    needs: frozenset[str]
    takes: frozenset[str]
    stream: Callable[[Given, Settings], Iterator[str]] | None = None


def chosen_run(runs: Mapping[str, Run], given: Given, name: str | None = None) -> str:
    """Return which of a model's runs fits the inputs.

    Args:
        runs: By name; the first that fits is taken.
        given: The inputs, none of which may stay unused.
        name: The one that was requested; None for any.

    Raises:
        InputError: If none fits; what each takes is listed.
    """
    offered = {key: run for key, run in runs.items() if name in (None, key)}
    if not offered:
        raise InputError(
            f"The task {name!r} is not one of this model's: {', '.join(runs) or 'it has none'}."
        )
    for key, run in offered.items():
        if given.names and run.needs <= given.names <= run.takes:
            return key
    wanted = "; ".join(f"{key} takes {_words(run)}" for key, run in offered.items())
    got = ", ".join(sorted(given.names)) or "nothing"
    raise InputError(f"Inputs: got {got}; {wanted}.")


def _words(run: Run) -> str:
    needed = " and ".join(sorted(run.needs))
    others = " or ".join(sorted(run.takes - run.needs))
    return f"{needed}, with {others} beside" if needed and others else needed or others
