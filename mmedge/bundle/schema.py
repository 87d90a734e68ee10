"""JSON Schema of the manifest, printed by `python -m mmedge.bundle.schema`."""

from __future__ import annotations

import json
import sys

from mmedge.bundle.manifest import Manifest

__all__ = ["manifest_schema"]


def manifest_schema() -> str:
    """Return the JSON Schema of `manifest.json` as indented JSON with a trailing newline."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(manifest_schema())
