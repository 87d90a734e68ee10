"""JSON Schema of `io.json`, printed by `python -m mmedge.exports.schema`."""

from __future__ import annotations

import json
import sys

from mmedge.exports.document import IoDocument

__all__ = ["io_schema"]


def io_schema() -> str:
    """Return the JSON Schema of `io.json` as indented JSON with a trailing newline."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | IoDocument.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(io_schema())
