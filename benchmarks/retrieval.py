"""Approximate engines: recall, latency, memory, disk and build time on the same data.

Every engine is tuned to the smallest search width that reaches recall@10 of 0.98 for image queries
and 0.95 for text queries on one half of the queries; recall and times are of the other half. The
process runs on one CPU. A timed search ends with the ids and one metadata field of the matches:
from the engine itself where it stores fields, else from SQLite. An engine that is not installed or
fails is listed with the reason. The peers belong in an environment of their own.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import ratio
from record import argument_parser, record
from retrieval_data import Data, generate

from mmedge.retrieval.index import Index
from mmedge.specs import Array, Float32Array, Modality

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before an engine starts threads
K = 10
TARGETS = {"image": 0.98, "text": 0.95}
Search = Callable[[Float32Array, int], list[int]]
"""Ids of the K nearest to a (D,) query at a search width, metadata read."""


class Engine:
    """A peer: `build` fills it, `search` asks it, `widths` are tried in order."""

    widths: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    package = "faiss-cpu"

    def __init__(self, folder: Path, record_path: Path) -> None:
        self.folder = folder
        self.tuning: dict[str, Float32Array] = {}
        self.fields = sqlite3.connect(record_path)

    def named(self, ids: Iterable[int]) -> list[int]:
        """Read the metadata of these items; return their ids."""
        wanted = [int(each) for each in ids if each >= 0]
        marks = ",".join("?" * len(wanted))
        found = dict(
            self.fields.execute(f"SELECT key, field FROM items WHERE key IN ({marks})", wanted)  # noqa: S608
        )
        return [each for each in wanted if found[each]]

    def build(self, vectors: Float32Array) -> None:
        """Store the vectors; ids are their positions."""
        raise NotImplementedError

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Return the ids of the K nearest."""
        raise NotImplementedError

    def searcher(self, kind: str) -> Search:
        """Return the search for a kind of query."""
        del kind  # a peer knows one kind
        return self.search


class Mmedge(Engine):
    """mmedge's Index; the widths are thousandths of the recall that a search asks for."""

    package = "mmedge"
    widths = (950, 960, 970, 980, 985, 990, 995, 999)

    def build(self, vectors: Float32Array) -> None:
        """Add the vectors, then put them in lists, measured with the tuning queries."""
        self.index = Index.create(self.folder / "x.index", dim=vectors.shape[1])
        for start in range(0, len(vectors), 10_000):
            some = vectors[start : start + 10_000]
            names = [str(key) for key in range(start, start + len(some))]
            fields = [{"field": "x"} for _ in names]
            self.index.add(vectors=some, ids=names, metadata=fields, durability="batch")
        self.index.compact(self.tuning)

    def searcher(self, kind: str) -> Search:
        """Return the search for a kind of query."""
        modality = Modality(kind)

        def search(query: Float32Array, width: int) -> list[int]:
            found = self.index.search(query, K, recall=width / 1000, modality=modality)
            return [int(match.id) for match in found if match.metadata["field"]]

        return search


class Ivf(Engine):
    """Faiss inverted lists, mapped from a file, re-ranked with mapped fp16 vectors."""

    codes = "SQ8"
    refined = 4

    def build(self, vectors: Float32Array) -> None:
        """Build, write, and open mapped."""
        faiss: Any = importlib.import_module("faiss")  # its stubs lack what is used here

        faiss.omp_set_num_threads(1)
        self.faiss = faiss
        lists = max(16, int(4 * len(vectors) ** 0.5))
        index = faiss.index_factory(
            vectors.shape[1], f"IVF{lists},{self.codes}", faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 10
        index.cp.max_points_per_centroid = 64
        index.train(vectors[:: max(1, len(vectors) // (64 * lists))])
        index.add(vectors)
        faiss.write_index(index, str(self.folder / "ann"))
        del index
        self.index = faiss.read_index(str(self.folder / "ann"), faiss.IO_FLAG_MMAP)
        vectors.astype(np.float16).tofile(self.folder / "f16")
        self.exact = np.memmap(self.folder / "f16", np.float16, "r", shape=vectors.shape)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search `width` lists."""
        asked = self.faiss.SearchParametersIVF(nprobe=width)
        _, (found,) = self.index.search(query[None], self.refined * K, params=asked)
        found = found[found >= 0]
        order = np.argsort(-(self.exact[found].astype(np.float32) @ query))[:K]
        return self.named(found[order])


class IvfRabitq(Ivf):
    """Faiss inverted lists of 1-bit RaBitQ codes, re-ranked with mapped fp16 vectors."""

    codes = "RaBitQfs"
    refined = 20


class IvfFp16(Ivf):
    """Faiss inverted lists of fp16 vectors."""

    codes = "SQfp16"
    refined = 1


class Hnsw(Engine):
    """Faiss HNSW over int8 codes."""

    widths = (16, 32, 64, 96, 128, 192, 256, 384, 512, 800, 1200, 2000)

    def build(self, vectors: Float32Array) -> None:
        """Build in memory."""
        faiss: Any = importlib.import_module("faiss")  # its stubs lack what is used here

        faiss.omp_set_num_threads(1)
        self.faiss = faiss
        index = faiss.index_factory(vectors.shape[1], "HNSW32_SQ8", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(self.folder / "ann"))
        self.index = index
        self.exact = vectors

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search with efSearch `width`."""
        asked = self.faiss.SearchParametersHNSW(efSearch=width)
        _, (found,) = self.index.search(query[None], 4 * K, params=asked)
        found = found[found >= 0]
        return self.named(found[np.argsort(-(self.exact[found] @ query))[:K]])


class Usearch(Engine):
    """HNSW over fp16 vectors, mapped."""

    package = "usearch"
    widths = Hnsw.widths

    def build(self, vectors: Float32Array) -> None:
        """Build, save, and view."""
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", expansion_add=100)
        index.add(np.arange(len(vectors)), vectors, threads=1)
        index.save(str(self.folder / "ann"))
        self.index = Index.restore(str(self.folder / "ann"), view=True)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search with expansion `width`."""
        self.index.expansion_search = width
        return self.named(self.index.search(query, K, threads=1).keys)


class Zvec(Engine):
    """HNSW over int8 codes of FP32 input, with a refiner; stores the field itself."""

    package = "zvec"
    widths = Hnsw.widths

    def build(self, vectors: Float32Array) -> None:
        """Insert and optimize."""
        import zvec

        self.zvec = zvec
        zvec.init(query_threads=1, optimize_threads=1, log_level=zvec.LogLevel.ERROR)
        graph = zvec.HnswIndexParam(
            metric_type=zvec.MetricType.IP,
            m=32,
            ef_construction=200,
            quantize_type=zvec.QuantizeType.INT8,
        )
        schema = zvec.CollectionSchema(
            name="peer",
            fields=[zvec.FieldSchema("field", zvec.DataType.STRING)],
            vectors=[
                zvec.VectorSchema("v", zvec.DataType.VECTOR_FP32, vectors.shape[1], graph),
            ],
        )
        self.store = zvec.create_and_open(str(self.folder / "store"), schema)
        for start in range(0, len(vectors), 500):
            self.store.insert(
                [
                    zvec.Doc(id=str(key), vectors={"v": vectors[key]}, fields={"field": "x"})
                    for key in range(start, min(start + 500, len(vectors)))
                ]
            )
        self.store.flush()
        self.store.optimize(zvec.OptimizeOption(concurrency=1))

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search with ef `width`."""
        param = self.zvec.HnswQueryParam(ef=width, is_using_refiner=True)
        asked = self.zvec.Query(field_name="v", vector=query, param=param)
        found = self.store.query(asked, topk=K, output_fields=["field"])
        return [int(each.id) for each in found]


class Turbovec(Engine):
    """4-bit codes, all scanned; the best `width` re-ranked with mapped fp16 vectors."""

    package = "turbovec"
    widths = (10, 20, 40, 80, 160)

    def build(self, vectors: Float32Array) -> None:
        """Add and prepare."""
        from turbovec import TurboQuantIndex

        self.index = TurboQuantIndex(vectors.shape[1], 4)
        self.index.add(vectors)
        self.index.prepare()
        self.index.write(str(self.folder / "ann"))
        vectors.astype(np.float16).tofile(self.folder / "f16")
        self.exact = np.memmap(self.folder / "f16", np.float16, "r", shape=vectors.shape)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Re-rank the best `width`."""
        _, found = self.index.search(query[None], width)
        ids = np.asarray(found)[0].astype(np.int64)
        order = np.argsort(-(self.exact[ids].astype(np.float32) @ query))[:K]
        return self.named(ids[order])


class Lancedb(Engine):
    """LanceDB's inverted lists of RaBitQ codes, refined; stores the field itself."""

    package = "lancedb"
    widths = (4, 8, 16, 32, 64, 128)

    def build(self, vectors: Float32Array) -> None:
        """Create the table and its index."""
        import lancedb
        import pyarrow as pa

        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        keys = pa.array(np.arange(len(vectors)))
        data = pa.table({"key": keys, "field": pa.array(["x"] * len(vectors)), "vector": flat})
        self.table = lancedb.connect(self.folder / "store").create_table("t", data)
        self.table.create_index(
            metric="dot",
            vector_column_name="vector",
            index_type="IVF_RQ",
            num_partitions=max(8, int(len(vectors) ** 0.5)),
        )

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search `width` partitions."""
        asked = self.table.search(query).nprobes(width).refine_factor(10).limit(K)
        found: list[int] = asked.select(["key", "field"]).to_arrow()["key"].to_pylist()
        return found


class SqliteVec(Engine):
    """sqlite-vec's scan of int8 vectors, the best `width` re-ranked in float32."""

    package = "sqlite-vec"
    widths = (10, 40)

    def build(self, vectors: Float32Array) -> None:
        """Insert."""
        import sqlite_vec

        self.store = sqlite3.connect(self.folder / "store")
        self.store.enable_load_extension(True)
        sqlite_vec.load(self.store)
        self.store.execute(
            f"CREATE VIRTUAL TABLE v USING vec0(e int8[{vectors.shape[1]}] distance_metric=cosine)"
        )
        self.scale = 127 / float(np.abs(vectors).max())
        self.exact = vectors
        rows = ((key + 1, self._codes(each)) for key, each in enumerate(vectors))
        self.store.executemany("INSERT INTO v(rowid, e) VALUES (?, vec_int8(?))", rows)
        self.store.commit()

    def _codes(self, vector: Float32Array) -> bytes:
        return bytes((vector * self.scale).round().clip(-127, 127).astype(np.int8))

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Re-rank the best `width`."""
        found = self.store.execute(
            "SELECT rowid FROM v WHERE e MATCH vec_int8(?) AND k = ?", (self._codes(query), width)
        )
        ids = np.array([key - 1 for (key,) in found])
        return self.named(ids[np.argsort(-(self.exact[ids] @ query))[:K]])


ENGINES: dict[str, type[Engine]] = {
    "mmedge": Mmedge,
    "faiss IVF SQ8": Ivf,
    "faiss IVF RaBitQ": IvfRabitq,
    "faiss IVF fp16": IvfFp16,
    "faiss HNSW SQ8": Hnsw,
    "usearch HNSW fp16": Usearch,
    "zvec HNSW int8": Zvec,
    "turbovec 4-bit": Turbovec,
    "lancedb IVF_RQ": Lancedb,
    "sqlite-vec int8": SqliteVec,
}


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", type=int, default=20_000, help="stored vectors")
    parser.add_argument("--queries", type=int, default=200, help="queries of each kind")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated names")
    arguments = parser.parse_args()
    data = generate(arguments.size, queries=arguments.queries)
    truth = {kind: _truth(data.vectors, each) for kind, each in data.queries.items()}
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
    fields = place / "fields.sqlite"
    connection = sqlite3.connect(fields)
    connection.execute("CREATE TABLE items(key INTEGER PRIMARY KEY, field TEXT)")
    connection.executemany(
        "INSERT INTO items VALUES (?, ?)", ((key, "x") for key in range(len(data.vectors)))
    )
    connection.commit()
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
                if _recall(search, width, queries[:half], found[:half]) >= target:
                    break
            recall = _recall(search, width, queries[half:], found[half:])
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


def _recall(search: Search, width: int, queries: Float32Array, truth: Array) -> float:
    shared = [
        len(set(search(query, width)) & set(found.tolist()))
        for query, found in zip(queries, truth, strict=True)
    ]
    return float(np.sum(shared)) / truth.size


def _truth(vectors: Float32Array, queries: Float32Array) -> Array:
    similarity = queries @ vectors.T
    return np.argpartition(-similarity, K, axis=1)[:, :K]


def _anonymous() -> int:
    """Return this process's anonymous memory in MiB."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) >> 10
    return 0


if __name__ == "__main__":
    main()
