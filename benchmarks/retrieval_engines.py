"""Engines for approximate search, each at settings of its own, behind one small interface."""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.retrieval.index import Index
from mmedge.specs import Array, Float32Array, Modality

__all__ = [
    "ENGINES", "TARGETS", "Engine", "Hnsw", "HnswFp32", "Ivf", "IvfFp16", "K", "Search",
    "recall_of", "true_nearest", "write_fields",
]  # fmt: skip

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
        """Store the vectors in the folder; ids are their positions."""
        raise NotImplementedError

    def open(self) -> None:
        """Open what was built."""
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
        with Index.create(self.folder / "x.index", dim=vectors.shape[1]) as index:
            for start in range(0, len(vectors), 10_000):
                some = vectors[start : start + 10_000]
                names = [str(key) for key in range(start, start + len(some))]
                fields = [{"field": "x"} for _ in names]
                index.add(vectors=some, ids=names, metadata=fields, durability="batch")
            index.compact(self.tuning)

    def open(self) -> None:
        """Open the index."""
        self.index = Index.open(self.folder / "x.index", read_only=True)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search as for an image."""
        return self.searcher("image")(query, width)

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
        """Build and write."""
        faiss = _faiss()
        lists = max(16, int(4 * len(vectors) ** 0.5))
        index = faiss.index_factory(
            vectors.shape[1], f"IVF{lists},{self.codes}", faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 10
        index.cp.max_points_per_centroid = 64
        index.train(vectors[:: max(1, len(vectors) // (64 * lists))])
        index.add(vectors)
        faiss.write_index(index, str(self.folder / "ann"))
        np.save(self.folder / "f16.npy", vectors.astype(np.float16))

    def open(self) -> None:
        """Open mapped."""
        self.faiss = _faiss()
        self.index = self.faiss.read_index(str(self.folder / "ann"), self.faiss.IO_FLAG_MMAP)
        self.exact = np.load(self.folder / "f16.npy", mmap_mode="r")

    def asked(self, width: int) -> Any:  # noqa: ANN401, faiss has no types
        """Return search parameters for `width` lists."""
        return self.faiss.SearchParametersIVF(nprobe=width)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search `width` lists."""
        _, (found,) = self.index.search(query[None], self.refined * K, params=self.asked(width))
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
    """Faiss HNSW over int8 codes, re-ranked with mapped fp16 vectors."""

    widths = (16, 32, 64, 96, 128, 192, 256, 384, 512, 800, 1200, 2000)
    factory = "HNSW32_SQ8"
    construction = 100
    refined = 4

    def build(self, vectors: Float32Array) -> None:
        """Build in memory and write."""
        faiss = _faiss()
        index = faiss.index_factory(vectors.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.construction
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(self.folder / "ann"))
        np.save(self.folder / "f16.npy", vectors.astype(np.float16))

    def open(self) -> None:
        """Read the graph into memory."""
        self.faiss = _faiss()
        self.index = self.faiss.read_index(str(self.folder / "ann"))
        self.exact = np.load(self.folder / "f16.npy", mmap_mode="r")

    def asked(self, width: int) -> Any:  # noqa: ANN401, faiss has no types
        """Return search parameters for efSearch `width`."""
        return self.faiss.SearchParametersHNSW(efSearch=width)

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search with efSearch `width`."""
        _, (found,) = self.index.search(query[None], self.refined * K, params=self.asked(width))
        found = found[found >= 0]
        order = np.argsort(-(self.exact[found].astype(np.float32) @ query))[:K]
        return self.named(found[order])


class HnswFp32(Hnsw):
    """Faiss HNSW over float32 vectors, as MilvusStore creates it."""

    factory = "HNSW16_Flat"
    construction = 200
    refined = 1


class Usearch(Engine):
    """HNSW over fp16 vectors, mapped."""

    package = "usearch"
    widths = Hnsw.widths

    def build(self, vectors: Float32Array) -> None:
        """Build and save."""
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", expansion_add=100)
        index.add(np.arange(len(vectors)), vectors, threads=1)
        index.save(str(self.folder / "ann"))

    def open(self) -> None:
        """View, which maps the file."""
        from usearch.index import Index

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
        store = zvec.create_and_open(str(self.folder / "store"), schema)
        for start in range(0, len(vectors), 500):
            store.insert(
                [
                    zvec.Doc(id=str(key), vectors={"v": vectors[key]}, fields={"field": "x"})
                    for key in range(start, min(start + 500, len(vectors)))
                ]
            )
        store.flush()
        store.optimize(zvec.OptimizeOption(concurrency=1))

    def open(self) -> None:
        """Open the store."""
        import zvec

        self.zvec = zvec
        self.store = zvec.open(str(self.folder / "store"))

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

        index = TurboQuantIndex(vectors.shape[1], 4)
        index.add(vectors)
        index.prepare()
        index.write(str(self.folder / "ann"))
        np.save(self.folder / "f16.npy", vectors.astype(np.float16))

    def open(self) -> None:
        """Load the codes."""
        from turbovec import TurboQuantIndex

        self.index = TurboQuantIndex.load(str(self.folder / "ann"))
        self.index.prepare()
        self.exact = np.load(self.folder / "f16.npy", mmap_mode="r")

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
        table = lancedb.connect(self.folder / "store").create_table("t", data)
        table.create_index(
            metric="dot",
            vector_column_name="vector",
            index_type="IVF_RQ",
            num_partitions=max(8, int(len(vectors) ** 0.5)),
        )

    def open(self) -> None:
        """Open the table."""
        import lancedb

        self.table = lancedb.connect(self.folder / "store").open_table("t")

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search `width` partitions."""
        asked = self.table.search(query).nprobes(width).refine_factor(10).limit(K)
        found: list[int] = asked.select(["key", "field", "_distance"]).to_arrow()["key"].to_pylist()
        return found


class SqliteVec(Engine):
    """sqlite-vec's scan of 1-bit codes, the best `width` re-ranked with mapped fp16 vectors.

    Codes are the signs of what is left without the part along the mean, which all vectors share.
    """

    package = "sqlite-vec"
    widths = (50, 100, 200, 400, 800, 1600, 3200)

    def build(self, vectors: Float32Array) -> None:
        """Insert."""
        self.shared = vectors.mean(axis=0)
        self.shared /= np.linalg.norm(self.shared)
        np.save(self.folder / "shared.npy", self.shared)
        self._connect()
        codes = f"bit[{vectors.shape[1]}], chunk_size=4096"
        self.store.execute(f"CREATE VIRTUAL TABLE v USING vec0(e {codes})")
        rows = ((key, self._code(each)) for key, each in enumerate(vectors, 1))
        with self.store:
            self.store.executemany("INSERT INTO v(rowid, e) VALUES (?, vec_bit(?))", rows)
        self.store.close()
        np.save(self.folder / "f16.npy", vectors.astype(np.float16))

    def open(self) -> None:
        """Connect."""
        self._connect()
        self.shared = np.load(self.folder / "shared.npy")
        self.exact = np.load(self.folder / "f16.npy", mmap_mode="r")

    def _connect(self) -> None:
        import apsw  # Python's own sqlite3 is often built without loadable extensions
        import sqlite_vec

        self.store = apsw.Connection(str(self.folder / "store"))
        self.store.enable_load_extension(True)
        self.store.load_extension(sqlite_vec.loadable_path())

    def _code(self, vector: Float32Array) -> bytes:
        return np.packbits(vector > self.shared * (self.shared @ vector)).tobytes()

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Re-rank the best `width`."""
        asked = "SELECT rowid FROM v WHERE e MATCH vec_bit(?) AND k = ?"
        found = self.store.execute(asked, (self._code(query), width))
        ids = np.array([key - 1 for (key,) in found])
        order = np.argsort(-(self.exact[ids].astype(np.float32) @ query))[:K]
        return self.named(ids[order])


class Qdrant(Engine):
    """Qdrant Edge's HNSW over int8 codes, re-ranked with fp16 vectors; stores the field itself."""

    package = "qdrant-edge-py"
    widths = Hnsw.widths

    def build(self, vectors: Float32Array) -> None:
        """Insert and optimize into one segment."""
        import qdrant_edge as qdrant

        codes = qdrant.ScalarQuantizationConfig(
            qdrant.ScalarType.Int8, quantile=0.99, memory=qdrant.Memory.Pinned
        )
        stored = qdrant.EdgeVectorParams(
            size=vectors.shape[1],
            distance=qdrant.Distance.Dot,
            datatype=qdrant.VectorStorageDatatype.Float16,
            hnsw_config=qdrant.HnswIndexConfig(
                m=32, ef_construct=200, full_scan_threshold=1, max_indexing_threads=1
            ),
            quantization_config=codes,
        )
        one_segment = qdrant.EdgeOptimizersConfig(
            default_segment_number=1, max_segment_size=1 << 30, indexing_threshold=1
        )
        config = qdrant.EdgeConfig(
            stored,
            optimizers=one_segment,
            max_search_threads=1,
            payload_memory=qdrant.Memory.Cached,
        )
        store = qdrant.EdgeShard.create(str(self.folder / "store"), config)
        for start in range(0, len(vectors), 1000):
            stop = min(start + 1000, len(vectors))
            points = [
                qdrant.Point(key, vectors[key].tolist(), {"field": "x"})
                for key in range(start, stop)
            ]
            store.update(qdrant.UpdateOperation.upsert_points(points))
        store.optimize()
        store.flush()
        store.close()

    def open(self) -> None:
        """Load the shard."""
        import qdrant_edge as qdrant

        self.qdrant = qdrant
        self.store = qdrant.EdgeShard.load(str(self.folder / "store"))

    def search(self, query: Float32Array, width: int) -> list[int]:
        """Search with hnsw_ef `width`."""
        qdrant = self.qdrant
        codes = qdrant.QuantizationSearchParams(rescore=True, oversampling=2.0)
        request = qdrant.SearchRequest(
            qdrant.Query.Nearest(query.tolist()),
            K,
            params=qdrant.SearchParams(hnsw_ef=width, quantization=codes),
            with_payload=True,
        )
        return [point.id for point in self.store.search(request) if point.payload["field"]]


ENGINES: dict[str, type[Engine]] = {
    "mmedge": Mmedge,
    "faiss IVF SQ8": Ivf,
    "faiss IVF RaBitQ": IvfRabitq,
    "faiss IVF fp16": IvfFp16,
    "faiss HNSW SQ8": Hnsw,
    "faiss HNSW fp32": HnswFp32,
    "usearch HNSW fp16": Usearch,
    "zvec HNSW int8": Zvec,
    "turbovec 4-bit": Turbovec,
    "lancedb IVF_RQ": Lancedb,
    "sqlite-vec 1-bit": SqliteVec,
    "qdrant-edge HNSW int8": Qdrant,
}


def _faiss() -> Any:  # noqa: ANN401, its stubs lack what is used here
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    return faiss


def recall_of(search: Search, width: int, queries: Float32Array, truth: Array) -> float:
    """Return the share of the true nearest that a search finds at a width."""
    shared = [
        len(set(search(query, width)) & set(found.tolist()))
        for query, found in zip(queries, truth, strict=True)
    ]
    return float(np.sum(shared)) / truth.size


def true_nearest(vectors: Float32Array, queries: Float32Array) -> Array:
    """Return the (Q, K) places of the vectors nearest to queries, unordered."""
    similarity = queries @ vectors.T
    return np.argpartition(-similarity, K, axis=1)[:, :K]


def write_fields(path: Path, count: int) -> Path:
    """Write an SQLite file with a field for each of the items 0 to count - 1; return its path."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE items(key INTEGER PRIMARY KEY, field TEXT)")
    rows = ((key, "x") for key in range(count))
    connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
    connection.commit()
    connection.close()
    return path
