"""Typed, bounded reading of foreign configuration; errors name file and key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mmedge.errors import MmedgeError, SourceError
from mmedge.files.json_file import read_json

__all__ = ["Fields", "check_architecture", "foreign_errors", "read_fields"]

_MAX_BYTES = 16 << 20
_T = TypeVar("_T")

# Bounds of configuration values, for all architectures. Sizes are also compared with
# the tensors of the checkpoint.
_COUNTS = {
    "num_hidden_layers": 4096,
    "n_layer": 4096,
    "num_layers": 4096,
    "encoder_layers": 4096,
    "decoder_layers": 4096,
}
_SIZES = {
    "hidden_size": 1 << 17,
    "d_model": 1 << 17,
    "n_embd": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}
_NUMBERS = {
    **_COUNTS,
    **_SIZES,
    "max_position_embeddings": 1 << 24,  # rotary positions take no tensor
    "n_positions": 1 << 24,
    "num_attention_heads": 1 << 12,
    "n_head": 1 << 12,
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
}
_OPTIONAL_NUMBERS = {"projection_dim": 1 << 17, "projection_size": 1 << 17}
_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
_DIVIDED = (
    ("hidden_size", "num_attention_heads"),
    ("d_model", "num_attention_heads"),
    ("n_embd", "n_head"),
)


@dataclass(frozen=True)
class Fields:
    """The keys of one JSON object; every getter raises a SourceError that names file and key.

    Attributes:
        file: The file, for messages.
        values: The object.
        path: Position in the file ("text_config."); empty at the top.
    """

    file: Path
    values: Mapping[str, object]
    path: str = ""

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer from `low` to `high`."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            expected = f"{low}" if low == high else f"an integer from {low} to {high}"
            raise self.error(key, expected)
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Return one integer or a list of integers, each from `low` to `high`."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return (self.integer(key, low, high),)
        if value and all(type(item) is int and low <= item <= high for item in value):
            return tuple(value)
        raise self.error(key, f"integers from {low} to {high}")

    def number(self, key: str, low: float, high: float) -> float:
        """Return a finite number above `low` and up to `high`."""
        return self._number(key, self.values.get(key), low, high)

    def triple(self, key: str, low: float, high: float) -> tuple[float, float, float]:
        """Return three numbers above `low` and up to `high`, or one for all three."""
        value = self.values.get(key)
        if isinstance(value, (list, tuple)):
            if len(value) != 3:
                raise self.error(key, "three numbers (red, green, blue)")
            one, two, three = (self._number(key, item, low, high) for item in value)
            return one, two, three
        number = self._number(key, value, low, high)
        return number, number, number

    def flag(self, key: str) -> bool:
        """Return true or false; null and a missing key are false."""
        value = self.values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """Return a string that is not empty."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string")
        return value

    def choice(self, key: str, choices: Mapping[object, _T]) -> _T:
        """Return the meaning of a value."""
        value = self.values.get(key)
        if isinstance(value, (list, dict, bool)) or value not in choices:
            raise self.error(key, f"one of {', '.join(map(str, choices))}")
        return choices[value]

    def section(self, key: str) -> Fields | None:
        """Return the fields of an object within this one; None where it is null or missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return Fields(self.file, value, f"{self.path}{key}.")

    def sections(self) -> Iterator[Fields]:
        """Yield this object and the objects within it that hold a part's configuration."""
        yield self
        for key in self.values:
            if key.endswith("_config") and (inner := self.section(key)) is not None:
                yield from inner.sections()

    def error(self, key: str, expected: str, advice: str = "") -> SourceError:
        """Return the error for a key of the wrong type or beyond its bounds."""
        got = repr(self.values[key])[:80] if key in self.values else "nothing"
        return SourceError(
            f"{self.file}, {self.path}{key}: got {got}, expected {expected}. "
            + (advice or "Correct the file, or fetch it again.")
        )

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high:
            return float(value)
        raise self.error(key, f"a number above {low:g} and up to {high:g}")


def read_fields(path: Path) -> Fields:
    """Read a JSON file that holds one object.

    Raises:
        SourceError: If it is missing, no regular file, too large, not UTF-8 JSON, nested too deep,
            or holds something else.
    """
    values = read_json(path, max_bytes=_MAX_BYTES, error=SourceError)
    if not isinstance(values, dict):
        raise SourceError(f"{path}: got a JSON {type(values).__name__}, expected an object.")
    return Fields(path, values)


def check_architecture(config: Fields, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check the sizes in a `config.json` before a model is built from them.

    Args:
        config: The whole file.
        shapes: Shapes of the checkpoint's tensors, by name.

    Raises:
        SourceError: If a size is of another type, beyond what any model has, larger than all of
            the checkpoint, or the heads do not divide the width; or if the weights are quantized.
    """
    largest = max((math.prod(shape) for shape in shapes.values()), default=0)
    for part in config.sections():
        _check_not_quantized(part)
        for key, high in _NUMBERS.items():
            if key not in part.values:
                continue
            sides = key in {"image_size", "patch_size"}
            most = part.integer(key, 1, high) if sides else max(part.integers(key, 1, high))
            if (key in _COUNTS and most > len(shapes)) or (key in _SIZES and most > largest):
                raise part.error(
                    key,
                    f"no more than the checkpoint holds ({len(shapes)} tensors, the largest of "
                    f"{largest} values)",
                    "Fetch config.json and weights of one revision.",
                )
        for key, high in _OPTIONAL_NUMBERS.items():
            if part.values.get(key) is not None:
                part.integer(key, 1, high)
        for key in _EPSILONS:
            if key in part.values:
                part.number(key, 0.0, 1.0)
        for width, heads in _DIVIDED:
            size, count = part.values.get(width), part.values.get(heads)
            if isinstance(size, int) and isinstance(count, int) and size % count:
                raise part.error(heads, f"a divisor of {width} {size}")
        side, patch = part.values.get("image_size"), part.values.get("patch_size")
        if isinstance(side, int) and isinstance(patch, int):
            part.integer("patch_size", 1, side)
            if "num_channels" in part.values:
                part.integer("num_channels", 3, 3)


def _check_not_quantized(part: Fields) -> None:
    for key in ("quantization_config", "compression_config"):
        section = part.section(key)
        if section is not None:
            method = section.values.get("quant_method", "an unnamed method")
            raise SourceError(
                f"{part.file}, {part.path}{key}: the weights are quantized ({str(method)[:40]}), "
                "expected fp32, fp16 or bf16: mmedge quantizes them itself. Pass the model that it "
                "was quantized from, or save model.dequantize() with save_pretrained."
            )


@contextmanager
def foreign_errors(what: str, advice: str) -> Iterator[None]:
    """Convert a library's error about a source file into a SourceError.

    Args:
        what: What cannot be done, "FOLDER: its tokenizer cannot be loaded".
        advice: The way out.

    Raises:
        SourceError: With the first line of the library's own message.
    """
    try:
        yield
    except BaseException as error:
        # tokenizers raises Exception itself, and its panics are no Exceptions.
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, MmedgeError) or not (isinstance(error, Exception) or panic):
            raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise SourceError(f"{what} ({line[:200]}). {advice}") from error
