"""Engine probe: describes one engine in a separate process, started by mmedge.machine.host.

Prints one line of JSON: the engine's description, or `fault`, why it does not start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from mmedge.errors import MmedgeError
from mmedge.runtimes.backends import probe

__all__ = ["main"]


def main(name: str) -> None:
    """Probe one engine and print its description.

    Args:
        name: A backend's, or "cuda".
    """
    found: Mapping[str, object]
    try:
        found = probe(name)
    except MmedgeError as error:
        found = {"fault": str(error)}
    except (ImportError, OSError, RuntimeError) as error:
        found = {"fault": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
