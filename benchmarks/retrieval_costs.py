"""What a search compares, and what that costs: measurements that `retrieval_scale.py` extrapolates.

Measures each engine at some sizes on one CPU: how many vectors a search compares, at which width it
reaches the wanted recall, the CPU time of a comparison, memory, build time, how the work of queries
differs, and the recall of a set that is cut into segments. The largest size is also predicted from
the others. With `--milvus URI` searches of a Milvus server are measured beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import argument_parser, record
from retrieval_data import Data, generate
from retrieval_engines import (
    TARGETS,
    Hnsw,
    HnswFp32,
    Ivf,
    IvfFp16,
    K,
    true_nearest,
    write_fields,
)
from retrieval_milvus import measure_milvus
from retrieval_model import PowerLaw

from mmedge.specs import Array, Float32Array

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before an engine starts threads
ENGINES: dict[str, type[Ivf | Hnsw]] = {
    "HNSW fp32": HnswFp32,
    "HNSW int8": Hnsw,
    "IVF fp16": IvfFp16,
    "IVF int8": Ivf,
}
_SCATTERED: dict[type[Ivf | Hnsw], int] = {Hnsw: 512, HnswFp32: 4 * 512}
"""Bytes of a vector that a search reads by itself; lists are read in sequence."""
_SEGMENTS = 8  # into which the largest size is cut, to see how their work differs
_NEAR, _FAR = 128 << 20, 4 << 30  # bytes of the vectors measured, and of much larger segments


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One engine at one size, for one kind of query; arrays by search width.

    Attributes:
        size: Stored vectors.
        widths: (W,) search widths.
        compared: (W,) mean vectors compared.
        cpu_s: (W,) median CPU seconds of a search in the engine.
        found: (W, Q) share of the true nearest that each query finds.
    """

    size: int
    widths: Array
    compared: Array
    cpu_s: Array
    found: Array

    def width_at(self, recall: float, queries: Array | None = None) -> float:
        """Return the width at which some queries reach a recall, between the measured ones."""
        found = self.found if queries is None else self.found[:, queries]
        rising = np.maximum.accumulate(found.mean(axis=1))
        return float(np.exp(np.interp(recall, rising, np.log(self.widths))))


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", default="10000,30000,100000", help="measured, ascending")
    parser.add_argument("--queries", type=int, default=200, help="queries of each kind")
    parser.add_argument("--milvus", help="address of a Milvus server to check the model with")
    arguments = parser.parse_args()
    sizes = [int(each) for each in arguments.sizes.split(",")]
    largest = generate(sizes[-1], queries=arguments.queries)
    # Parts of one set: what differs between sizes is the size alone.
    sets = [Data(largest.vectors[:size], largest.queries) for size in sizes]
    results: dict[str, Any] = {"sizes": sizes, "dim": 512, "k": K, "costs": []}
    for name, engine in ENGINES.items():
        for row in _measured(engine, sets):
            results["costs"].append({"engine": name, **row})
            print(results["costs"][-1], flush=True)
    if arguments.milvus:
        results["milvus"] = measure_milvus(arguments.milvus, sets[1:])
    record(arguments.output, results)


def _measured(kind_of: type[Ivf | Hnsw], sets: list[Data]) -> list[dict[str, Any]]:
    """Measure an engine; return a row for each kind of query."""
    points: dict[str, list[Point]] = {kind: [] for kind in TARGETS}
    for data in sets:
        with tempfile.TemporaryDirectory() as place:
            engine = _empty(kind_of, Path(place), len(data.vectors))
            started = time.process_time()
            engine.build(data.vectors)
            engine.open()
            build_s = (time.process_time() - started) / len(data.vectors)
            vector_bytes = (engine.folder / "ann").stat().st_size / len(data.vectors)
            for kind, queries in data.queries.items():
                points[kind].append(_point(engine, data, queries))
    laws = {kind: _laws(points[kind], target) for kind, target in TARGETS.items()}
    spread = _spread(kind_of, sets[-1], {kind: law[1] for kind, law in laws.items()})
    far_s = _far_s(_SCATTERED[kind_of]) if kind_of in _SCATTERED else 0.0
    rows = []
    for kind, target in TARGETS.items():
        fixed_s, unit_s = _line(points[kind][-1])
        (work, width), (relative, recall) = laws[kind], spread[kind]
        rows.append(
            {
                "queries": kind,
                "fixed_us": round(fixed_s * 1e6, 1),
                "unit_ns": round(unit_s * 1e9, 1),
                "far_ns": round(far_s * 1e9, 1),
                "compared_law": [round(each, 3) for each in (work.constant, *work.powers)],
                "width_law": [round(each, 3) for each in (width.constant, *width.powers)],
                "vector_bytes": round(vector_bytes),
                "build_us": round(build_s * 1e6),
                "spread_p95": round(float(np.percentile(relative, 95)), 2),
                "compared_at_1e6": round(work(10**6, max(1.0, width(10**6)))),
                "compared_at_1e6_range": _range(points[kind], target, 10**6),
                "recall_over_segments": round(recall, 4),
                "largest_predicted_over_measured": _held_out(points[kind], target),
            }
        )
    return rows


def _empty(kind_of: type[Ivf | Hnsw], place: Path, count: int) -> Ivf | Hnsw:
    folder = place / "engine"
    folder.mkdir()
    return kind_of(folder, write_fields(place / "fields.sqlite", count))


def _point(engine: Ivf | Hnsw, data: Data, queries: Float32Array) -> Point:
    truth, rows, shares = true_nearest(data.vectors, queries), [], []
    for width in engine.widths:
        counts, cpu_s, found = [], [], []
        for query, true in zip(queries, truth, strict=True):
            count, seconds = _compared(engine, query, width)
            hits = engine.search(query, width)
            counts.append(count)
            cpu_s.append(seconds)
            found.append(len(set(hits) & set(true.tolist())) / K)
        rows.append((width, np.mean(counts), np.median(cpu_s)))
        shares.append(found)
        if np.mean(found) > 0.99:
            break
    widths, compared, cpu = np.array(rows, np.float64).T
    return Point(len(data.vectors), widths, compared, cpu, np.array(shares))


def _compared(engine: Ivf | Hnsw, query: Float32Array, width: int) -> tuple[int, float]:
    """Search; return how many vectors were compared and the CPU seconds."""
    faiss, asked = engine.faiss, engine.asked(width)
    wanted = 4 * K if engine.refined > 1 else K
    stats = faiss.cvar.hnsw_stats if isinstance(engine, Hnsw) else faiss.cvar.indexIVF_stats
    stats.reset()
    started = time.thread_time()
    engine.index.search(query[None], wanted, params=asked)
    seconds = time.thread_time() - started
    centroids = 0 if isinstance(engine, Hnsw) else engine.index.nlist
    return int(stats.ndis) + centroids, seconds


def _line(point: Point) -> tuple[float, float]:
    """Return fixed and unit CPU seconds, by least squares of the relative errors."""
    design = np.stack([1 / point.cpu_s, point.compared / point.cpu_s], axis=1)
    (fixed, unit), *_ = np.linalg.lstsq(design, np.ones(len(design)), rcond=None)
    if fixed < 0:
        return 0.0, float(np.median(point.cpu_s / point.compared))
    return float(fixed), float(unit)


def _laws(
    points: list[Point], target: float, queries: Array | None = None
) -> tuple[PowerLaw, PowerLaw]:
    """Return the laws of the vectors compared and of the width at which queries reach a recall."""
    sizes = np.concatenate([np.full(len(each.widths), each.size) for each in points])
    widths = np.concatenate([each.widths for each in points])
    compared = np.concatenate([each.compared for each in points])
    wanted = np.array([each.width_at(target, queries) for each in points])
    measured = np.array([each.size for each in points])
    return PowerLaw.fitted(compared, sizes, widths), PowerLaw.fitted(wanted, measured)


def _range(points: list[Point], target: float, size: int) -> list[int]:
    """Return the 90 % interval of the vectors compared at a size, over draws of the queries."""
    rng, drawn = np.random.default_rng(0), []
    count = points[0].found.shape[1]
    for _ in range(100):
        work, width = _laws(points, target, rng.integers(0, count, (count,)))
        drawn.append(work(size, max(1.0, width(size))))
    return [round(float(each)) for each in np.percentile(drawn, [5, 95])]


def _spread(
    kind_of: type[Ivf | Hnsw], data: Data, widths: dict[str, PowerLaw]
) -> dict[str, tuple[Array, float]]:
    """Cut a set into segments and search all of them, as a distributed engine does.

    Returns:
        By kind of query what each query compares in each segment over the mean, (Q, S), and the
        recall of the merged results.
    """
    compared: dict[str, list[list[int]]] = {kind: [] for kind in TARGETS}
    hits: dict[str, list[list[list[int]]]] = {kind: [] for kind in TARGETS}
    for number in range(_SEGMENTS):
        some = np.ascontiguousarray(data.vectors[number::_SEGMENTS])
        with tempfile.TemporaryDirectory() as place:
            engine = _empty(kind_of, Path(place), len(some))
            engine.build(some)
            engine.open()
            for kind, queries in data.queries.items():
                width = max(1, round(widths[kind](len(some))))
                compared[kind].append([_compared(engine, query, width)[0] for query in queries])
                hits[kind].append(
                    [
                        [number + _SEGMENTS * place for place in engine.search(query, width)]
                        for query in queries
                    ]
                )
    found = {}
    for kind, queries in data.queries.items():
        truth, right = true_nearest(data.vectors, queries), 0
        for query, true, lists in zip(queries, truth, zip(*hits[kind], strict=True), strict=True):
            merged = np.concatenate(lists)
            best = merged[np.argsort(-(data.vectors[merged] @ query))[:K]]
            right += len(set(best.tolist()) & set(true.tolist()))
        counts = np.array(compared[kind]).T
        found[kind] = (counts / counts.mean(), right / truth.size)
    return found


def _far_s(row_bytes: int) -> float:
    """Return how much longer a row takes from memory that no cache or TLB covers."""
    rng = np.random.default_rng(0)
    seconds = []
    for size in (_NEAR, _FAR):
        rows = np.ones((size // row_bytes, row_bytes), np.uint8)
        taken = []
        for some in rng.integers(len(rows), size=(30, 2000)):
            started = time.thread_time()
            rows.take(some, axis=0)
            taken.append((time.thread_time() - started) / len(some))
        seconds.append(min(taken))  # what else runs only adds
        del rows
    return max(0.0, seconds[1] - seconds[0])


def _held_out(points: list[Point], target: float) -> dict[str, float]:
    """Predict the largest size from the others: prediction over measurement."""
    *rest, last = points
    work, width = _laws(rest, target)
    fixed_s, unit_s = _line(rest[-1])
    wanted = last.width_at(target)
    compared, cpu_s = (
        float(np.interp(np.log(wanted), np.log(last.widths), each))
        for each in (last.compared, last.cpu_s)
    )
    predicted = work(last.size, width(last.size))
    return {
        "width": round(width(last.size) / wanted, 3),
        "compared_at_width": round(work(last.size, wanted) / compared, 3),
        "cpu": round((fixed_s + unit_s * predicted) / cpu_s, 3),
    }


if __name__ == "__main__":
    main()
