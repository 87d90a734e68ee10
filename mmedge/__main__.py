"""`python -m mmedge`, the same as `mmedge`."""

from __future__ import annotations

import sys

__all__: list[str] = []

if __name__ == "__main__":
    # Python puts the current folder first, except in safe-path mode.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]
    from mmedge.cli import main

    main()
