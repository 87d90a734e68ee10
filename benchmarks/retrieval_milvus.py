"""Searches of a Milvus server, to check a model of it with."""

from __future__ import annotations

import secrets
import time
from typing import Any

import numpy as np
from retrieval_data import Data
from retrieval_engines import K, true_nearest

from mmedge.specs import Float32Array

__all__ = ["measure_milvus"]

_WIDTHS = (64, 128, 400)
_WAIT_S = 600.0


def measure_milvus(address: str, sets: list[Data]) -> dict[str, Any]:
    """Measure text queries in collections of float32 vectors with HNSW, as MilvusStore makes them.

    Args:
        address: Of the server.
        sets: Data, each put into a collection that is dropped afterwards.

    Returns:
        `request_ms`, the median of a search in a collection of 100 vectors, and `rows`: size,
        vectors of each segment, width, median and recall of searches.
    """
    from pymilvus import MilvusClient

    client = MilvusClient(address, timeout=60)
    few = Data(sets[0].vectors[:100], sets[0].queries)
    (request, *_) = _searches(client, few)
    rows = [row for data in sets for row in _searches(client, data)]
    return {
        "server": client.get_server_version(),
        "request_ms": request["p50_ms"],
        "rows": rows,
    }


def _searches(client: Any, data: Data) -> list[dict[str, Any]]:  # noqa: ANN401, untyped
    from pymilvus import DataType

    name = f"scale_{secrets.token_hex(6)}"
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=data.vectors.shape[1])
    index = client.prepare_index_params()
    graph = {"M": 16, "efConstruction": 200}
    index.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
    client.create_collection(name, schema=schema, index_params=index, num_shards=1)
    try:
        for start in range(0, len(data.vectors), 2000):
            some = enumerate(data.vectors[start : start + 2000], start)
            client.insert(name, [{"key": key, "vector": vector} for key, vector in some])
        client.flush(name)
        segments = _wait(client, name, len(data.vectors))
        # Waits until all that was inserted is seen.
        client.search(name, data=[data.vectors[0]], limit=1, consistency_level="Strong")
        truth = true_nearest(data.vectors, data.queries["text"])
        return [
            {"size": len(data.vectors), "segments": segments, "width": width}
            | _timed(client, name, data.queries["text"], truth, width)
            for width in _WIDTHS
        ]
    finally:
        client.drop_collection(name)


def _wait(client: Any, name: str, count: int) -> list[int]:  # noqa: ANN401, untyped
    """Wait until all rows are indexed and loaded; return the vectors of each segment."""
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        described = client.describe_index(name, "vector")
        loaded = client.list_loaded_segments(name)
        sealed = [each.num_rows for each in loaded if str(each.state).endswith("Sealed")]
        pending = int(described.get("pending_index_rows", 0))
        if pending == 0 and sum(sealed) >= count:
            return sorted(sealed)
        time.sleep(1)
    raise RuntimeError(f"Milvus has not indexed {count} rows in {_WAIT_S:.0f} s: {described}")


def _timed(
    client: Any,  # noqa: ANN401, untyped
    name: str,
    queries: Float32Array,
    truth: Any,  # noqa: ANN401
    width: int,
) -> dict[str, float]:
    taken, right = [], 0
    for query, true in zip(queries, truth, strict=True):
        started = time.perf_counter()
        (hits,) = client.search(
            name,
            data=[query],
            limit=K,
            output_fields=["key"],
            search_params={"params": {"ef": width}},
            consistency_level="Bounded",
        )
        taken.append(time.perf_counter() - started)
        right += len({hit["entity"]["key"] for hit in hits} & set(true.tolist()))
    middle, late = np.percentile(taken, [50, 95]) * 1e3
    recall = round(right / truth.size, 4)
    return {"p50_ms": round(float(middle), 2), "p95_ms": round(float(late), 2), "recall": recall}
