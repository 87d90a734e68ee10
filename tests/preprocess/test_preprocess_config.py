"""What a processor's configuration may say, and which class runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import tokenizer_json
from pydantic import TypeAdapter, ValidationError

from mmedge.preprocess import ProcessorConfig, open_processor
from mmedge.preprocess.registry import PROCESSORS

ADAPTER: TypeAdapter[ProcessorConfig] = TypeAdapter(ProcessorConfig)

RESIZE = {"op": "resize", "mode": "exact", "height": 8, "width": 8, "resample": "bicubic"}
NORMALIZE = {"op": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
LENGTH = {"op": "fit_length", "samples": 4800, "pad": "zeros", "truncate": "first"}
LOG_MEL = {
    "op": "log_mel",
    "fft_size": 512,
    "hop": 160,
    "mels": 8,
    "min_hz": 0,
    "max_hz": 8000,
    "scale": "htk",
    "norm": None,
    "log": "db",
}
IMAGE_STEPS: list[dict[str, Any]] = [
    {"op": "decode"},
    RESIZE,
    {"op": "crop", "height": 6, "width": 7},
    {"op": "rescale", "factor": 1 / 255},
    NORMALIZE,
]
PATCHES = {"op": "patches", "size": 8, "count": 9, "resample": "bilinear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "image": {"type": "image", "steps": IMAGE_STEPS},
    "text": {"type": "text", "max_length": 8, "padding": "longest", "pad_id": 0},
    "audio": {"type": "audio", "sampling_rate": 16_000, "steps": [LENGTH, LOG_MEL]},
    "vector": {"type": "vector", "input": "state", "size": 2, "mean": [1, 2], "std": [1, 2]},
    "video": {"type": "video", "frames": 2, "steps": IMAGE_STEPS},
}
SAMPLES: dict[str, Any] = {
    "image": np.zeros((9, 9, 3), np.uint8),
    "text": "a photo",
    "audio": (np.zeros(2000, np.float32), 16_000),
    "vector": [3.0, 4.0],
    "video": np.zeros((2, 9, 9, 3), np.uint8),
}


def changed(kind: str, *path: str | int, value: object) -> dict[str, Any]:
    """Return a copy of a configuration with one value replaced."""

    def replaced(node: Any, keys: tuple[str | int, ...]) -> Any:
        if not keys:
            return value
        copied = node.copy()
        head, rest = keys[0], keys[1:]
        if isinstance(copied, dict) and head not in copied:
            copied[head] = value
        else:
            copied[head] = replaced(copied[head], rest)
        return copied

    result: dict[str, Any] = replaced(CONFIGS[kind], path)
    return result


def test_every_type_has_a_configuration_a_class_and_a_sample() -> None:
    assert set(PROCESSORS) == set(CONFIGS) == set(SAMPLES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_survives_json_and_opens_its_processor(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(), "utf-8")
    config = ADAPTER.validate_python(CONFIGS[kind])
    assert ADAPTER.validate_json(config.model_dump_json()) == config
    processor = open_processor(config, tmp_path)
    assert processor.config is config
    assert processor.modality.value == kind
    feed = processor([SAMPLES[kind], SAMPLES[kind]])
    assert config.input in feed
    assert {len(array) for array in feed.values()} == {2}
    assert {array.dtype.name for array in feed.values()} <= {"float32", "int64", "bool"}


INFINITE = [float("inf"), float("nan"), 1e300, -1e300]
REFUSED: list[tuple[str, tuple[str | int, ...], list[Any]]] = [
    ("image", ("input",), ["", "x" * 257]),
    ("image", ("steps", 0, "alpha"), ["black"]),
    ("image", ("steps", 1, "height"), [0, -1, 16_385, 10**9]),
    ("image", ("steps", 1, "resample"), ["cubic"]),
    ("image", ("steps", 1, "mode"), ["longest_edge"]),
    ("image", ("steps", 2, "height"), [0, -1, 16_385, 10**9, 2**64]),
    ("image", ("steps", 2), [{"op": "crop", "height": 16_384, "width": 16_384}]),
    ("image", ("steps", 3, "factor"), [0, -1, 1e-7, 1e4, *INFINITE]),
    ("image", ("steps", 4, "mean", 0), INFINITE),
    ("image", ("steps", 4, "std", 0), [0, -1, 1e-7, *INFINITE]),
    ("image", ("steps", 4, "std"), [[0.5], [0.5] * 4]),
    ("image", ("steps", 1), [{**RESIZE, "mode": "shortest_edge", "width": 9}]),
    ("image", ("steps",), [[], [RESIZE], [{"op": "decode"}, {"op": "decode"}]]),
    ("image", ("steps",), [[{"op": "decode"}, NORMALIZE, RESIZE], [{"op": "decode"}, LENGTH]]),
    ("image", ("steps",), [[{"op": "decode"}, RESIZE, PATCHES]]),
    ("image", ("steps", 2), [PATCHES]),
    *(
        ("image", ("steps",), [[{"op": "decode"}, PATCHES | change]])
        for change in (
            {"count": 0},
            {"count": 1_000_000},
            {"size": 0},
            {"size": 1024, "count": 16_384},
            {"resample": "gaussian"},
        )
    ),
    ("image", ("unknown",), [1]),
    ("text", ("max_length",), [0, 1_000_001, 2**64]),
    ("text", ("pad_id",), [-1, 2**31, 2**63]),
    ("text", ("tokenizer_file",), [""]),
    ("audio", ("sampling_rate",), [0, 999, 10**6]),
    ("audio", ("steps",), [[], [LENGTH], [LOG_MEL, LENGTH], [LENGTH, LOG_MEL, LOG_MEL]]),
    ("audio", ("steps", 0, "samples"), [0, 256, 10**9]),
    ("audio", ("steps", 1, "fft_size"), [1, 10**6]),
    ("audio", ("steps", 1, "hop"), [0, 10**6]),
    ("audio", ("steps", 1, "mels"), [0, 1025]),
    ("audio", ("steps", 1, "max_hz"), [0, 8001, *INFINITE]),
    ("audio", ("steps", 1, "min_hz"), [-1, 8000, *INFINITE]),
    ("audio", ("steps", 1, "norm"), ["l2"]),
    ("audio", ("steps", 0), [{**LENGTH, "truncate": "random"}]),
    ("vector", ("size",), [0, 1, 3, 10**9]),
    ("vector", ("std", 0), [0, 1e-7, *INFINITE]),
    ("vector", ("mean", 0), INFINITE),
    ("vector", ("type",), ["tensor"]),
    ("video", ("frames",), [0, -1, 1025]),
    ("video", ("steps",), [[], [RESIZE], [{"op": "decode"}, PATCHES]]),
]


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [(kind, path, value) for kind, path, values in REFUSED for value in values],
)
def test_values_that_no_processor_can_use_are_refused(
    kind: str, path: tuple[str | int, ...], value: object
) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(changed(kind, *path, value=value))


def test_fusion_needs_decibels() -> None:
    steps = [{**LENGTH, "truncate": "fusion"}, {**LOG_MEL, "log": "whisper"}]
    with pytest.raises(ValidationError, match="expected log 'db'"):
        ADAPTER.validate_python(changed("audio", "steps", value=steps))
