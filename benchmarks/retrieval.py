"""Approximate engines: recall, latency, memory, disk and build time on the same data.

Every engine is tuned to the smallest search width that reaches recall@10 of 0.98 for image queries
and 0.95 for text queries on one half of the queries; recall and times are of the other half. The
process runs on one CPU. A timed search ends with the ids and one metadata field of the matches:
from the engine itself where it stores fields, else from SQLite. An engine that is not installed or
fails is listed with the reason.
"""

from __future__ import annotations

import gc
import json
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
from retrieval_engines import (
    ENGINES,
    TARGETS,
    Engine,
    K,
    Search,
    recall_of,
    true_nearest,
    write_fields,
)

from mmedge.specs import Array, Float32Array

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before an engine starts threads


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", type=int, default=20_000, help="stored vectors")
    parser.add_argument("--queries", type=int, default=200, help="queries of each kind")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated names")
    parser.add_argument("--keep", type=Path, help="folder of indexes that are built once and kept")
    parser.add_argument(
        "--build-only", action="store_true", help="build what is not kept there yet"
    )
    arguments = parser.parse_args()
    names = arguments.engines.split(",")
    data = generate(arguments.size, queries=arguments.queries)
    results: dict[str, Any] = {"size": arguments.size, "dim": data.vectors.shape[1], "k": K}
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.keep or Path(temporary)
        place.mkdir(exist_ok=True)
        rows, opened = _opened(place, names, data)
        if arguments.build_only:
            return
        truth = {kind: true_nearest(data.vectors, each) for kind, each in data.queries.items()}
        chosen = _tuned(rows, opened, data.queries, truth)
        _timed(rows, chosen, data.queries)
    results["engines"] = rows
    for name, row in rows.items():
        print(name, row)
    record(arguments.output, results)


def _opened(
    place: Path, names: list[str], data: Data
) -> tuple[dict[str, dict[str, Any]], dict[str, Engine]]:
    """Build the engines that are not kept in a folder yet, and open all of them."""
    fields = place / "fields.sqlite"
    if not fields.exists():
        write_fields(fields, len(data.vectors))
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, Engine] = {}
    for name in names:
        folder = place / name.replace(" ", "_")
        built = folder.with_suffix(".json")
        engine = ENGINES[name](folder, fields)
        engine.tuning = {kind: each[: len(each) // 2] for kind, each in data.queries.items()}
        gc.collect()
        before, started = _anonymous(), time.perf_counter()
        try:
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                row: dict[str, Any] = {"version": version(engine.package)}
                cpu = time.process_time()
                engine.build(data.vectors)
                seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
                row |= {"build_s": round(seconds, 1), "build_cpu_s": round(cpu, 1)}
                row |= {"rows_per_s": round(len(data.vectors) / seconds)}
                size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
                row["disk_mib"] = round(size / 2**20)
                built.write_text(json.dumps(row), "utf-8")
                gc.collect()
                before = _anonymous()
            engine.open()
        except PackageNotFoundError as error:
            rows[name] = {"not_measured": f"{error} is not installed"}
            continue
        except Exception as error:  # noqa: BLE001, a peer may raise anything
            rows[name] = {"not_measured": f"{type(error).__name__}: {error}"[:300]}
            shutil.rmtree(folder, ignore_errors=True)
            continue
        engine.search(data.queries["image"][0], engine.widths[0])
        rows[name] = json.loads(built.read_text("utf-8")) | {"anonymous_mib": _anonymous() - before}
        engines[name] = engine
        print(name, rows[name], flush=True)
    return rows, engines


def _tuned(
    rows: dict[str, dict[str, Any]],
    engines: dict[str, Engine],
    queries: dict[str, Float32Array],
    truth: dict[str, Array],
) -> dict[tuple[str, str], tuple[Search, int]]:
    """Choose the smallest width of each engine that reaches the wanted recall."""
    chosen: dict[tuple[str, str], tuple[Search, int]] = {}
    for name, engine in engines.items():
        for kind, target in TARGETS.items():
            half = len(queries[kind]) // 2
            search = engine.searcher(kind)
            for width in engine.widths:
                reached = recall_of(search, width, queries[kind][:half], truth[kind][:half])
                if reached >= target:
                    break
            recall = recall_of(search, width, queries[kind][half:], truth[kind][half:])
            rows[name] |= {f"width_{kind}": width, f"recall_{kind}": round(recall, 4)}
            chosen[name, kind] = (search, width)
        print(name, rows[name], flush=True)
    return chosen


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
