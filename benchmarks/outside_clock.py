"""Check of the profiler's figures against a clock outside the process.

A process encodes one image (or one text) N times, another 2N times; both are timed from outside,
start and end of the process included. The difference, divided by N, is what one call costs with
everything that is the same in both taken away: starting Python, loading, ending. It is compared
with the mean that `profile` reports for the same call in the rounds between, in wall-clock time and
in CPU time (user and system, as the kernel accounts it to the ended process). On a busy machine the
wall-clock ratio scatters with whatever else runs; the CPU ratio does not.

    python benchmarks/outside_clock.py --bundle clip.mmedge
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import argument_parser, record

from mmedge.bundle import open_bundle
from mmedge.profiling import Budget, ProfileConfig, profile
from mmedge.profiling.inputs import TEXT, frame_jpeg

# What the timed processes run.
_CALLS = """
import sys
from mmedge import SessionOptions, load
bundle, role, variant, frame, text, calls = sys.argv[1:]
options = SessionOptions(device="cpu", threads=1)
model = load(bundle, precision=variant, roles=[role], options=options, backend="onnxruntime")
jpeg = open(frame, "rb").read()
for _ in range(int(calls)):
    model.encode_image(jpeg) if role == "image_encoder" else model.encode_text(text)
"""


def main() -> None:
    """Measure in rounds, and record the ratios."""
    parser = argument_parser(__doc__)
    parser.add_argument("--bundle", type=Path, help="default: full-size CLIP, random weights")
    parser.add_argument("--role", default="image_encoder", help="default: image_encoder")
    parser.add_argument("--variant", default="fp32", help="default: fp32")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of CPU time that N calls take; default: 4"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.jpg"
        frame.write_bytes(frame_jpeg())
        bundle = arguments.bundle or _full_size()
        name = open_bundle(bundle).manifest.name
        what = _Encoder(bundle, arguments.role, arguments.variant, frame)
        calls = max(round(1e3 * arguments.seconds / what.reported(0.5)["cpu_ms"]), 10)
        rounds = [_round(what, calls, arguments.seconds) for _ in range(arguments.rounds)]
    ratios = {
        clock: [each["reported"][clock] / each["outside"][clock] for each in rounds]
        for clock in ("wall_ms", "cpu_ms")
    }
    for clock, values in ratios.items():
        print(f"{clock}: reported / outside {statistics.median(values):.3f}", values)
    record(
        arguments.output,
        {
            "bundle": name,
            "role": arguments.role,
            "variant": arguments.variant,
            "calls": calls,
            "reported_to_outside_wall_median": statistics.median(ratios["wall_ms"]),
            "reported_to_outside_wall": ratios["wall_ms"],
            "reported_to_outside_cpu_median": statistics.median(ratios["cpu_ms"]),
            "reported_to_outside_cpu": ratios["cpu_ms"],
            "rounds": rounds,
        },
    )


def _full_size() -> Path:
    from full_size import bundle  # imports torch, which a given bundle does without

    return bundle()


@dataclass(frozen=True, slots=True)
class _Encoder:
    """The call measured from both sides."""

    bundle: Path
    role: str
    variant: str
    frame: Path

    def reported(self, seconds: float) -> dict[str, float]:
        """Return the profiler's means of one end-to-end call."""
        config = ProfileConfig(
            roles=(self.role,),
            precisions=(self.variant,),
            threads=(1,),
            sequences=("golden",),
            # The stages alternate with the call, which gets about half of the time.
            budget=Budget(seconds=2 * seconds, min_runs=20),
            cold_starts=0,
        )
        latency = profile(self.bundle, config).stages[0].end_to_end
        return {"wall_ms": latency.mean_ms, "cpu_ms": latency.cpu_ms}

    def outside(self, calls: int) -> dict[str, float]:
        """Return the time of a process of so many calls, measured from outside."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.monotonic()
        command = [sys.executable, "-c", _CALLS, self.bundle, self.role, self.variant, self.frame]
        subprocess.run([*map(str, command), TEXT, str(calls)], check=True)
        wall = time.monotonic() - start
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}


def _round(what: _Encoder, calls: int, seconds: float) -> dict[str, dict[str, float]]:
    once = what.outside(calls)
    reported = what.reported(seconds)
    twice = what.outside(2 * calls)
    outside = {clock: (twice[clock] - once[clock]) / calls for clock in once}
    print(f"reported {reported}, outside {outside}")
    return {"reported": reported, "outside": outside}


if __name__ == "__main__":
    main()
