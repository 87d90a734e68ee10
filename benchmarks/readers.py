"""Latency of 1, 4 and 16 reader processes beside a writer.

The index holds ready vectors in lists. A paced reader searches 20 times a second, as a program does
that has other work; the others search without a pause. The writer rests, or changes the index ten
times a second (add, update and delete 10 items in a call each, each call durable), or compacts it
over and over, on which readers map the new snapshot. All cases take turns, round after round, in
the same processes; each search takes ids and metadata of 10 matches. With more readers than CPUs
the times include waiting for a CPU, which `cpu_p50_ms` does not.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from record import argument_parser, record
from retrieval_data import generate

from mmedge.retrieval.index import Index
from mmedge.specs import Float32Array, Modality

READERS = (1, 4, 16)
Writer = Literal["none", "changes", "compacts"]
_AT_ONCE = 10  # items of a change
_PERIOD_S = 0.1  # of the writer's changes
_PACE_S = 0.05  # of a paced reader's searches


@dataclass(frozen=True, slots=True)
class Case:
    """How many readers search, whether paced, and what the writer does meanwhile."""

    readers: int
    paced: bool
    writer: Writer


CASES = [
    Case(count, True, writer) for count in READERS for writer in ("none", "changes", "compacts")
]
CASES += [Case(count, False, "changes") for count in READERS]


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", type=int, default=20_000, help="stored vectors")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case")
    parser.add_argument("--seconds", type=float, default=7.0, help="length of a turn")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # of the processes started below
    data = generate(arguments.size, queries=200)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.index"
        _create(path, data.vectors, data.queries)
        results = _measured(path, data.queries, arguments.rounds, arguments.seconds)
    record(arguments.output, {"size": arguments.size, "dim": data.vectors.shape[1], **results})


def _create(path: Path, vectors: Float32Array, queries: dict[str, Float32Array]) -> None:
    with Index.create(path, dim=vectors.shape[1]) as index:
        for start in range(0, len(vectors), 10_000):
            some = vectors[start : start + 10_000]
            names = [str(key) for key in range(start, start + len(some))]
            index.add(vectors=some, ids=names, metadata=[{"field": "x"}] * len(names))
        index.compact(queries)


def _measured(
    path: Path, queries: dict[str, Float32Array], rounds: int, seconds: float
) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    channels = []
    for number in range(max(READERS) + 1):
        ours, theirs = spawn.Pipe()
        work = _read if number else _write
        spawn.Process(target=work, args=(path, queries, number, theirs), daemon=True).start()
        channels.append(ours)
    for channel in channels:
        channel.recv()
    rng = np.random.default_rng(0)
    times: dict[Case, list[Float32Array]] = {case: [] for case in CASES}
    writes: dict[Case, int] = dict.fromkeys(CASES, 0)
    for _ in range(rounds):
        for place in rng.permutation(len(CASES)):
            case = CASES[place]
            busy = channels[: case.readers + 1]
            until = time.time() + seconds
            for channel in busy:
                channel.send((case, until))
            written, *read = (channel.recv() for channel in busy)
            writes[case] += written
            times[case] += read
    for channel in channels:
        channel.send(None)
    rows = [
        _row(case, np.concatenate(times[case]), writes[case], rounds * seconds) for case in CASES
    ]
    return {"k": 10, "cases": rows}


def _row(case: Case, taken: Float32Array, writes: int, seconds: float) -> dict[str, Any]:
    wall, cpu = taken.T * 1e3
    row = {
        "readers": case.readers,
        "paced": case.paced,
        "writer": case.writer,
        "n": len(wall),
        **{f"p{q}_ms": round(float(np.percentile(wall, q)), 3) for q in (50, 95, 99)},
        "cpu_p50_ms": round(float(np.median(cpu)), 3),
        "searches_per_s": round(len(wall) / seconds, 1),
        "writer_calls": writes,
    }
    print(row, flush=True)
    return row


def _read(path: Path, given: dict[str, Float32Array], number: int, channel: Connection) -> None:
    """Search as the cases say; send wall and CPU seconds of each search, (N, 2)."""
    queries = given["image"]
    rng = np.random.default_rng(number)
    with Index.open(path, read_only=True) as index:
        index.search(queries[0], 10, modality=Modality.IMAGE)
        channel.send(None)
        while (turn := channel.recv()) is not None:
            case, until = turn
            taken = []
            if case.paced:
                time.sleep(rng.uniform(0, _PACE_S))
            while time.time() < until:
                query = queries[rng.integers(len(queries))]
                started, started_cpu = time.perf_counter(), time.thread_time()
                found = index.search(query, 10, modality=Modality.IMAGE)
                wall, cpu = time.perf_counter() - started, time.thread_time() - started_cpu
                if len(found) != 10 or any(match.metadata != {"field": "x"} for match in found):
                    raise RuntimeError(f"not a state that was written: {found}")
                taken.append((wall, cpu))
                if case.paced:
                    time.sleep(max(0.0, _PACE_S - wall))
            channel.send(np.array(taken, np.float32).reshape(-1, 2))


def _write(path: Path, queries: dict[str, Float32Array], seed: int, channel: Connection) -> None:
    """Change or compact the index as the cases say; send how many calls that were."""
    rng = np.random.default_rng(seed)
    added = 0
    with Index.open(path) as index:
        channel.send(None)
        while (turn := channel.recv()) is not None:
            case, until = turn
            calls = 0
            while case.writer != "none" and (left := until - time.time()) > 0:
                if case.writer == "compacts":
                    index.compact(queries)
                    calls += 1
                    continue
                started = time.monotonic()
                vectors = rng.standard_normal((2, _AT_ONCE, index.dim), np.float32)
                names = [f"new{added + each}" for each in range(_AT_ONCE)]
                index.add(vectors=vectors[0], ids=names, metadata=[{"field": "x"}] * _AT_ONCE)
                index.update(names, vectors=vectors[1])
                index.delete([f"new{added + each - 10 * _AT_ONCE}" for each in range(_AT_ONCE)])
                added += _AT_ONCE
                calls += 3
                time.sleep(max(0.0, min(left, _PERIOD_S - (time.monotonic() - started))))
            channel.send(calls)


if __name__ == "__main__":
    main()
