"""JSON Schema of a profile, printed by `python -m mmedge.profiling.schema`."""

from __future__ import annotations

import json
import sys

from mmedge.profiling.result import Profile

__all__ = ["profile_schema"]


def profile_schema() -> str:
    """Return the JSON Schema of a profile as indented JSON with a trailing newline."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | Profile.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(profile_schema())
