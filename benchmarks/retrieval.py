"""Approximate engines: recall, latency, memory, disk and build time on the same data.

Every engine is tuned to the smallest search width that reaches recall@10 of 0.98 for image queries
and 0.95 for text queries on one half of the queries; recall and times are of the other half. The
process runs on one CPU. A timed search ends with the ids and one metadata field of the matches:
from the engine itself where it stores fields, else from SQLite. An engine that is not installed or
fails is listed with the reason.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import ratio
from record import argument_parser, record
from retrieval_data import Data, generate
from retrieval_engines import ENGINES, TARGETS, K, Search, recall_of, true_nearest, write_fields

from mmedge.specs import Array, Float32Array

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before an engine starts threads


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", type=int, default=20_000, help="stored vectors")
    parser.add_argument("--queries", type=int, default=200, help="queries of each kind")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated names")
    arguments = parser.parse_args()
    data = generate(arguments.size, queries=arguments.queries)
    truth = {kind: true_nearest(data.vectors, each) for kind, each in data.queries.items()}
    results: dict[str, Any] = {"size": arguments.size, "dim": data.vectors.shape[1], "k": K}
    with tempfile.TemporaryDirectory() as place:
        rows, chosen = _built(Path(place), arguments.engines.split(","), data, truth)
        _timed(rows, chosen, data.queries)
    results["engines"] = rows
    for name, row in rows.items():
        print(name, row)
    record(arguments.output, results)


def _built(
    place: Path, names: list[str], data: Data, truth: dict[str, Array]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], tuple[Search, int]]]:
    fields = write_fields(place / "fields.sqlite", len(data.vectors))
    rows: dict[str, dict[str, Any]] = {}
    chosen: dict[tuple[str, str], tuple[Search, int]] = {}
    for number, name in enumerate(names):
        folder = place / str(number)
        folder.mkdir()
        engine = ENGINES[name](folder, fields)
        engine.tuning = {kind: each[: len(each) // 2] for kind, each in data.queries.items()}
        gc.collect()
        before, started = _anonymous(), time.perf_counter()
        try:
            row: dict[str, Any] = {"version": version(engine.package)}
            engine.build(data.vectors)
        except PackageNotFoundError as error:
            rows[name] = {"not_measured": f"{error} is not installed"}
            continue
        except Exception as error:  # noqa: BLE001, a peer may raise anything
            rows[name] = {"not_measured": f"{type(error).__name__}: {error}"[:300]}
            shutil.rmtree(folder, ignore_errors=True)
            continue
        seconds = time.perf_counter() - started
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        row |= {"build_s": round(seconds, 1), "rows_per_s": round(len(data.vectors) / seconds)}
        row |= {"disk_mib": round(size / 2**20), "anonymous_mib": _anonymous() - before}
        for kind, target in TARGETS.items():
            queries, found = data.queries[kind], truth[kind]
            half = len(queries) // 2
            for width in engine.widths:
                search = engine.searcher(kind)
                if recall_of(search, width, queries[:half], found[:half]) >= target:
                    break
            recall = recall_of(search, width, queries[half:], found[half:])
            row |= {f"width_{kind}": width, f"recall_{kind}": round(recall, 4)}
            chosen[name, kind] = (search, width)
        rows[name] = row
        print(name, row, flush=True)
    return rows, chosen


def _timed(
    rows: dict[str, dict[str, Any]],
    chosen: dict[tuple[str, str], tuple[Search, int]],
    queries: dict[str, Float32Array],
) -> None:
    """Time one query of every engine after the other, round after round."""
    rng = np.random.default_rng(0)
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in chosen}
    for index in range(len(queries["image"]) // 2, len(queries["image"])):
        for place in rng.permutation(len(chosen)):
            pair = list(chosen)[place]
            search, width = chosen[pair]
            started = time.perf_counter()
            search(queries[pair[1]][index], width)
            times[pair].append(time.perf_counter() - started)
    for (name, kind), taken in times.items():
        base = times.get(("mmedge", kind), taken)
        rows[name] |= {
            f"p50_{kind}_ms": round(float(np.median(taken)) * 1e3, 3),
            f"p95_{kind}_ms": round(float(np.percentile(taken, 95)) * 1e3, 3),
            f"time_over_mmedge_{kind}": ratio(np.array(taken) / np.array(base)),
        }


def _anonymous() -> int:
    """Return this process's anonymous memory in MiB."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) >> 10
    return 0


if __name__ == "__main__":
    main()
