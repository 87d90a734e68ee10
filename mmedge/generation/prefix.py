"""A prompt's beginning with its state, computed once and shared by calls and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.errors import InputError
from mmedge.files.npz_file import read_npz, write_npz
from mmedge.specs import Array, State

__all__ = ["Prefix", "common_length"]

_TOKENS, _MODEL = "tokens", "model"


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


@dataclass(frozen=True)
class Prefix:
    """Tokens and the state that a decoder has after them.

    Attributes:
        tokens: The ids.
        state: By input name, see StatefulRun.save.
        model: Which decoder made it; another cannot use it.
    """

    tokens: tuple[int, ...]
    state: Mapping[str, Array]
    model: str

    def cut(self, length: int, state: State) -> dict[str, Array]:
        """Return the state of the first tokens.

        Raises:
            InputError: If the state cannot be cut, and `length` is shorter, or the state is not
                that of the tokens.
        """
        for tensor in state.tensors:
            shape, axis = np.shape(self.state.get(tensor.input, 0)), tensor.axis
            if tensor.input not in self.state or (
                axis is not None and shape[axis : axis + 1] != (len(self.tokens),)
            ):
                raise InputError(
                    f"prefix: got a state {tensor.input!r} of shape {shape}, expected one of "
                    f"{len(self.tokens)} positions. Make the prefix again."
                )
        if length == len(self.tokens):
            return dict(self.state)
        cut: dict[str, Array] = {}
        for tensor in state.tensors:
            array = self.state[tensor.input]
            if tensor.update == "replace":
                raise InputError("prefix: this model's state cannot be cut. Use it whole.")
            if tensor.axis is not None:
                where = (*[slice(None)] * tensor.axis, slice(length))
                array = np.ascontiguousarray(array[where])
            cut[tensor.input] = array
        return cut

    def save(self, path: Path | str) -> None:
        """Write the prefix to a file.

        Raises:
            StorageError: If it cannot be written.
        """
        arrays = {
            _TOKENS: np.array(self.tokens, np.int64),
            _MODEL: np.array(self.model),
            **{f"state.{name}": array for name, array in self.state.items()},
        }
        write_npz(Path(path), arrays)

    @classmethod
    def load(cls, path: Path | str) -> Prefix:
        """Read a prefix that `save` wrote.

        Raises:
            InputError: If it is none.
        """
        arrays = read_npz(Path(path), error=lambda why: InputError(f"{path}: {why}."))
        tokens, model = arrays.pop(_TOKENS, None), arrays.pop(_MODEL, None)
        state = {name.removeprefix("state."): array for name, array in arrays.items()}
        if (
            tokens is None
            or model is None
            or (tokens.dtype.kind, tokens.ndim, bool(tokens.size)) != ("i", 1, True)
            or (model.dtype.kind, model.ndim) != ("U", 0)
        ):
            raise InputError(f"{path}: not a prefix that mmedge saved. Save it again.")
        return cls(tuple(int(token) for token in tokens), state, str(model))
