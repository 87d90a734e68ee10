"""Cache folder."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the cache folder of mmedge.

    `$MMEDGE_CACHE_DIR`, else `$XDG_CACHE_HOME/mmedge`, else `~/.cache/mmedge`. It need not exist.
    """
    if own := os.environ.get("MMEDGE_CACHE_DIR"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "mmedge"
    return Path(os.path.expanduser("~")) / ".cache" / "mmedge"  # noqa: PTH111, never raises
