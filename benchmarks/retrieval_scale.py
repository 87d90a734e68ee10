"""What 10^8 and 10^9 vectors need on a distributed engine: a model, not a measurement.

Takes the costs that `retrieval_costs.py` measured and the assumptions of `retrieval_model.Cluster`
to 10^8 and 10^9 vectors. The same costs predict what `retrieval.py` recorded at its sizes and
widths, and searches of a Milvus server, so that it can be seen how far to trust them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from presenting import load
from record import RESULTS, argument_parser, record
from retrieval_model import Cluster, Costs, PowerLaw, latencies, plan

_RECORDED = {"faiss HNSW SQ8": "HNSW int8", "faiss IVF SQ8": "IVF int8"}
_REFINED_BYTES = {"IVF int8": 1024}  # fp16 vectors in a file of their own
_TOTALS = (10**8, 10**9)
_SEGMENT_GIB = (1, 8)  # of raw rows: Milvus's own limit, and a larger one
_QUERIES = 4000  # simulated


def main() -> None:
    """Run the model."""
    parser = argument_parser(__doc__)
    arguments = parser.parse_args()
    measured = load("retrieval_costs")["results"]
    costs = {(row["engine"], row["queries"]): _costs(row) for row in measured["costs"]}
    cluster = Cluster()
    results: dict[str, Any] = {"recorded": _recorded(costs)}
    if "milvus" in measured:
        cluster = replace(cluster, request_ms=measured["milvus"]["request_ms"])
        results["milvus"] = _milvus(measured["milvus"]["rows"], costs["HNSW fp32", "text"], cluster)
    results |= {"cluster": asdict(cluster), "needs": []}
    for total in _TOTALS:
        for name in dict.fromkeys(engine for engine, _ in costs):
            for gib in _SEGMENT_GIB:
                row = _needs(costs[name, "text"], cluster, total, gib)
                results["needs"].append({"vectors": total, "engine": name, **row})
                print(results["needs"][-1], flush=True)
    record(arguments.output, results)


def _costs(row: dict[str, Any]) -> Costs:
    """Return measured costs."""
    work, width = ((law[0], tuple(law[1:])) for law in (row["compared_law"], row["width_law"]))
    return Costs(
        row["fixed_us"] / 1e6,
        row["unit_ns"] / 1e9,
        row["far_ns"] / 1e9,
        PowerLaw(*work),
        PowerLaw(*width),
        row["vector_bytes"],
        math.log(row["spread_p95"]) / 1.645,
        row["build_us"] / 1e6,
    )


def _recorded(costs: dict[tuple[str, str], Costs]) -> list[dict[str, Any]]:
    """Predict what benchmarks/retrieval.py measured, at its sizes and widths."""
    rows = []
    for path in sorted(RESULTS.glob("retrieval_*.json")):
        results = json.loads(path.read_text("utf-8"))["results"]
        for label, row in results.get("engines", {}).items():
            if label not in _RECORDED or "p50_text_ms" not in row:
                continue
            name, size = _RECORDED[label], results["size"]
            for kind in ("image", "text"):
                cost = costs[name, kind]
                seconds = cost.fixed_s + cost.unit_s * cost.work(size, row[f"width_{kind}"])
                mib = size * (cost.vector_bytes + _REFINED_BYTES.get(name, 0)) / 2**20
                rows.append(
                    {
                        "file": path.name,
                        "size": size,
                        "engine": name,
                        "queries": kind,
                        "measured_p50_ms": row[f"p50_{kind}_ms"],
                        "predicted_p50_ms": round(seconds * 1e3, 3),
                        "measured_mib": row["disk_mib"],
                        "predicted_mib": round(mib),
                    }
                )
                print(rows[-1])
    return rows


def _milvus(rows: list[dict[str, Any]], cost: Costs, cluster: Cluster) -> list[dict[str, Any]]:
    """Predict searches of a Milvus server, whose segments lie on one node."""
    found = []
    for row in rows:
        compute_s = sum(
            cost.fixed_s + cost.unit_s * cost.work(size, row["width"]) for size in row["segments"]
        )
        predicted = round(cluster.request_ms + compute_s * 1e3, 2)
        found.append({**row, "predicted_p50_ms": predicted})
        print(found[-1])
    return found


def _needs(costs: Costs, cluster: Cluster, total: int, gib: int) -> dict[str, Any]:
    """Return what a collection needs, and how long its queries take."""
    segment = round(gib * 2**30 / (4 * 512 + cluster.row_bytes))
    wanted = plan(costs, cluster, total, segment)
    seconds = latencies(costs, cluster, wanted, segment, _QUERIES)
    idle = replace(cluster, utilisation=0.01)
    alone = latencies(costs, idle, plan(costs, idle, total, segment), segment, _QUERIES // 4)
    row = {
        "segment": segment,
        **{name: round(value, 2) for name, value in asdict(wanted).items()},
        "idle_p50_ms": round(float(np.median(alone["plain"])) * 1e3, 1),
    }
    for name, taken in seconds.items():
        for q in (50, 99):
            row[f"{name}_p{q}_ms"] = round(float(np.percentile(taken, q)) * 1e3, 1)
    return row


if __name__ == "__main__":
    main()
