"""`mmedge index add`, to be killed: says on stdout what each write has made durable.

Run as `python indexing.py FOLDER -m BUNDLE -o INDEX ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from mmedge import cli
from mmedge.retrieval import folders
from mmedge.retrieval.index import Index


def reported(name: str) -> Callable[..., Any]:
    """Index.add, update or delete, followed by a line of JSON with the call's name and ids."""
    write = getattr(Index, name)

    def call(index: Index, *arguments: Any, **named: Any) -> Any:
        done = write(index, *arguments, **named)
        ids = named["ids"] if "ids" in named else arguments[0]
        sys.stdout.write(json.dumps({"call": name, "ids": ids}) + "\n")
        sys.stdout.flush()
        return done

    return call


if __name__ == "__main__":
    folders._WRITE_ITEMS = 4
    for method in ("add", "update", "delete"):
        setattr(Index, method, reported(method))
    cli.main(["index", "add", *sys.argv[1:]])
