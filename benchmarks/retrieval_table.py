"""The sections of docs/retrieval.md and docs/scale.md that are made from recorded runs."""

from __future__ import annotations

from typing import Any

from presenting import load, table

__all__ = ["readers_section", "scale_section"]

_ENOUGH = 500  # samples of a p99
_WRITERS = {"none": "rests", "changes": "changes", "compacts": "compacts"}


def readers_section() -> str:
    """Return the latencies of readers beside a writer."""
    document = load("readers")
    results, machine = document["results"], document["machine"]
    rows = [
        [
            str(case["readers"]),
            "20 a second" if case["paced"] else "no pause",
            _WRITERS[case["writer"]],
            *(f"{case[key]:.1f}" for key in ("p50_ms", "p95_ms")),
            f"{case['p99_ms']:.0f}" if case["n"] >= _ENOUGH else "",
            f"{case['cpu_p50_ms']:.1f}",
            f"{case['searches_per_s']:.0f}",
        ]
        for case in results["cases"]
    ]
    head = ["readers", "searches each", "writer", "p50 ms", "p95 ms", "p99 ms"]
    head += ["CPU ms", "searches a second"]
    intro = (
        f"{results['size']:,} vectors of {results['dim']} dimensions in lists, 10 matches with ids "
        f"and metadata, {machine['processors_usable']} CPUs, {document['date'][:10]}, load average "
        f"{machine['load_average_1min']:.0f}: other programs had the CPUs too, so that the times "
        "hold much waiting for a CPU, and CPU ms (the median) none."
    )
    return "\n".join([intro, "", *table(head, rows)])


def scale_section() -> str:
    """Return what large collections need by the model, and how its predictions held."""
    document, results = load("retrieval_costs"), load("retrieval_scale")["results"]
    measured, machine = document["results"], document["machine"]
    lines = [
        (
            f"Costs measured on {document['date'][:10]} on one CPU ({machine['processor']}) at "
            f"{_sizes(measured)} vectors; CPU times, since the machine was busy (load average "
            f"{machine['load_average_1min']:.0f} at the end)."
        ),
        "",
        "### What is needed",
        "",
        "Model, text queries at recall@10 of 0.95, one copy of the data. Two copies for hedged.",
        "",
        *_needs(results["needs"]),
        "",
        "### What it is made from",
        "",
        *_costs(measured["costs"]),
        "",
        "### How its predictions held",
        "",
        (
            "The largest measured size predicted from the smaller ones, over its measurement. The "
            "widths of image queries are small, so that a few lists more are a large ratio:"
        ),
        "",
        *_held_out(measured["costs"]),
        "",
        (
            "Runs of `benchmarks/retrieval.py`, predicted at their sizes and search widths. Their "
            "times are wall times of engines that take turns, and hold what the model leaves out: "
            "cold caches, re-ranking, reading ids and fields, and with lists a mapped file:"
        ),
        "",
        *_recorded(results["recorded"]),
    ]
    if "milvus" in results:
        milvus = measured["milvus"]
        lines += [
            "",
            (
                f"Text queries to a Milvus server ({milvus['server']}, on the same busy machine); "
                f"a request takes {milvus['request_ms']:.1f} ms there when it searches 100 "
                "vectors. Where the recall is the same at every width, the server had not loaded "
                "all rows, and the times say nothing:"
            ),
            "",
            *_milvus(results["milvus"]),
        ]
    return "\n".join(lines)


def _sizes(results: dict[str, Any]) -> str:
    *some, last = (f"{size:,}" for size in results["sizes"])
    return f"{', '.join(some)} and {last}"


def _needs(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "vectors", "engine", "vectors a segment", "segments", "memory GiB", "nodes",
        "CPU ms a query", "queries a second", "p50 ms", "p99 ms", "p99 ms, hedged",
        "CPU hours to index",
    ]  # fmt: skip
    return table(
        head,
        [
            [
                f"10^{len(str(row['vectors'])) - 1}",
                row["engine"],
                f"{row['segment'] / 1e6:.1f} M",
                f"{row['segments']:,}",
                f"{row['memory_gib']:,.0f}",
                f"{row['nodes']}",
                f"{row['core_ms']:,.0f}",
                f"{row['queries_per_s']:,.0f}",
                f"{row['plain_p50_ms']:.0f}",
                f"{row['plain_p99_ms']:.0f}",
                f"{row['hedged_p99_ms']:.0f}",
                f"{row['build_core_hours']:,.0f}",
            ]
            for row in rows
        ],
    )


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "engine", "queries", "bytes a vector", "µs a search", "ns a comparison",
        "ns more in far memory", "compared, 10^6 vectors", "recall over 8 segments",
    ]  # fmt: skip
    return table(
        head,
        [
            [
                row["engine"],
                row["queries"],
                f"{row['vector_bytes']:,}",
                f"{row['fixed_us']:.0f}",
                f"{row['unit_ns']:.0f}",
                f"{row['far_ns']:.0f}",
                "{:,} ({:,} to {:,})".format(row["compared_at_1e6"], *row["compared_at_1e6_range"]),
                f"{row['recall_over_segments']:.3f}",
            ]
            for row in rows
        ],
    )


def _held_out(rows: list[dict[str, Any]]) -> list[str]:
    head = ["engine", "queries", "width", "compared at a width", "CPU time"]
    return table(
        head,
        [
            [
                row["engine"],
                row["queries"],
                *(f"{held[key]:.2f}" for key in ("width", "compared_at_width", "cpu")),
            ]
            for row in rows
            for held in [row["largest_predicted_over_measured"]]
        ],
    )


def _recorded(rows: list[dict[str, Any]]) -> list[str]:
    head = [
        "vectors",
        "engine",
        "queries",
        "p50 ms: model",
        "measured",
        "disk MiB: model",
        "measured",
    ]
    return table(
        head,
        [
            [
                f"{row['size']:,}",
                row["engine"],
                row["queries"],
                f"{row['predicted_p50_ms']:.2f}",
                f"{row['measured_p50_ms']:.2f}",
                f"{row['predicted_mib']}",
                f"{row['measured_mib']}",
            ]
            for row in rows
        ],
    )


def _milvus(rows: list[dict[str, Any]]) -> list[str]:
    head = ["vectors", "segments", "width", "recall", "p50 ms: model", "measured"]
    return table(
        head,
        [
            [
                f"{row['size']:,}",
                f"{len(row['segments'])}",
                f"{row['width']}",
                f"{row['recall']:.3f}",
                f"{row['predicted_p50_ms']:.1f}",
                f"{row['p50_ms']:.1f}",
            ]
            for row in rows
        ],
    )
