"""The tree drawn at the top of mmedge/errors.py is the tree of the classes."""

from __future__ import annotations

import pickle
import re

import pytest

from mmedge import errors
from mmedge.errors import MmedgeError


def _tree(kind: type[MmedgeError]) -> dict[str, str]:
    """Return every class below `kind` by name, with its parent's name."""
    found: dict[str, str] = {}
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            found[child.__name__] = kind.__name__
            found |= _tree(child)
    return found


def _drawing() -> dict[str, str]:
    """Return what the docstring draws, in the same form."""
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in errors.__doc__.split("```")[1].strip().splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+)", line)
        assert found, line
        depth, name = len(found.group(1)) // 4, found.group(2)
        del parents[depth:]
        if parents:
            drawn[name] = parents[-1]
        parents.append(name)
    return drawn


def test_the_drawing_is_the_tree() -> None:
    assert _drawing() == _tree(MmedgeError)
    assert len(_tree(MmedgeError)) >= 20


def test_all_names_every_class_in_order() -> None:
    assert errors.__all__ == sorted([*_tree(MmedgeError), "MmedgeError"])


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_documented_and_survives_a_process_boundary(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.__doc__

    carried = pickle.loads(pickle.dumps(kind("what happened")))  # noqa: S301 - as multiprocessing does
    assert type(carried) is kind
    assert str(carried) == "what happened"
