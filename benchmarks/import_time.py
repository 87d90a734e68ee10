"""Import time of mmedge, beside the imports that a device avoids.

Each start is a fresh process under `-X importtime`; the cost is the sum of what Python itself
reports for every module that a bare start has not loaded. The imports take turns, round by round,
so that a busy moment of the machine falls on all of them.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
import subprocess
import sys

from record import argument_parser, record

# `import mmedge` fetches its names when they are first used, so what a caller of load() pays is
# measured as well. The last is what a device would import without mmedge.
_STATEMENTS = {
    "mmedge": "import mmedge",
    "mmedge_load": "from mmedge import load",
    "numpy": "import numpy",
    "onnxruntime": "import onnxruntime",
    "torch": "import torch",
    "transformers_clip": "from transformers import CLIPModel, CLIPProcessor",
}
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$")


def self_ms(statement: str) -> dict[str, float]:
    """Run a statement in a fresh process and return the self time of every module it imports.

    The self times add up to the whole; cumulative ones, which Python reports as well, would count
    a module once more for each that imports it.
    """
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        capture_output=True,
        text=True,
        check=True,
    )
    matches = (_LINE.match(line) for line in done.stderr.splitlines())
    return {found.group(2): int(found.group(1)) / 1e3 for found in matches if found}


def main() -> None:
    """Measure, print and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()

    bare_start = self_ms("pass").keys()

    def total_ms(statement: str) -> float:
        return sum(ms for name, ms in self_ms(statement).items() if name not in bare_start)

    statements = {
        name: statement
        for name, statement in _STATEMENTS.items()
        if importlib.util.find_spec(statement.split()[1]) is not None
    }
    for statement in statements.values():  # bytecode and file cache are warm for all
        self_ms(statement)
    samples: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(arguments.rounds):
        for name, statement in statements.items():
            samples[name].append(total_ms(statement))

    by_package: dict[str, float] = {}
    for name, ms in self_ms(statements["mmedge_load"]).items():
        if name not in bare_start:
            package = name.split(".")[0]
            by_package[package] = by_package.get(package, 0.0) + ms
    largest = sorted(by_package.items(), key=lambda item: -item[1])[:8]

    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, median in medians.items():
        print(f"{statements[name]:55} {median:8.1f} ms  (n={arguments.rounds})")
    record(
        arguments.output,
        {
            "rounds": arguments.rounds,
            "median_ms": {name: round(median, 2) for name, median in medians.items()},
            "min_ms": {name: round(min(values), 2) for name, values in samples.items()},
            "mmedge_load_share_of": {
                name: round(medians["mmedge_load"] / median, 4)
                for name, median in medians.items()
                if not name.startswith("mmedge")
            },
            "mmedge_load_self_ms_by_package": {name: round(ms, 2) for name, ms in largest},
        },
    )


if __name__ == "__main__":
    main()
