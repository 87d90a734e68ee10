"""Makes what the tests of the backends share importable, from whichever folder they are started."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "trt")]

from fake_gpu import fake_gpu  # noqa: E402, F401, a fixture for all of them
