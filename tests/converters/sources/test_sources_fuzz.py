"""Any one wrong value or byte in a source passes, or is an error of mmedge's own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from describing import describe

from mmedge.converters.families.reference import check_reference
from mmedge.errors import MmedgeError

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 10**9, 10**30, 0.5, -1.5, 1e300, "", "x", "gelu", [], [0], [1, 2, 3],
    ["a"], {}, {"a": 1}, "\u0000", "9" * 50,
)  # fmt: skip
DELETED = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, long lists and vocabularies left out."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict) and len(value) < 100:
        inner = list(value.items())
    elif isinstance(value, list) and len(value) < 6:
        inner = list(enumerate(value))
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(folder: Path, rng: random.Random) -> None:
    """Change one value of a JSON file, or one byte of any file."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix == ".json" and rng.random() < 0.8:
        document = json.loads(path.read_text())
        *outer, key = rng.choice(list(places(document)))
        inside = document
        for step in outer:
            inside = inside[step]
        value = rng.choice([*VALUES, DELETED])
        if value is DELETED:
            inside.pop(key)
        else:
            inside[key] = value
        path.write_text(json.dumps(document))
    else:
        content = bytearray(path.read_bytes())
        content[rng.randrange(min(len(content), 4000))] = rng.randrange(256)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "family", ["clip", "siglip", "clap", "dinov2", "resnet", "sentence", "vit"]
)
def test_one_wrong_thing_is_no_traceback(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original = request.getfixturevalue(f"{family}_folder")
    rng = random.Random(20)  # noqa: S311
    refused = 0
    for index in range(25):
        folder = shutil.copytree(original, tmp_path / str(index))
        mutate(folder, rng)
        try:
            described = describe(folder)
            processors = described.freeze(tmp_path / f"{index}-out")
            for role, reference in described.spec.references.items():
                spec = described.spec.roles[role]()
                check_reference(described.source, role, spec, processors, reference)
        except MmedgeError:
            refused += 1
    assert 5 < refused < 25
