"""Tables of encoders_real_size.py's record, for docs/cpu-speed.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from presenting import load, ratio_cell, table
from real_size_names import SUBJECTS

__all__ = ["lines"]

_OURS = {
    "mmedge int8-dynamic": "int8-dynamic",
    "mmedge int8-static": "int8-static",
    "mmedge int8-static in openvino": "int8-static in OpenVINO",
}
_PEERS = {
    "onnxruntime quantize_dynamic": "quantize_dynamic",
    "onnxruntime quantize_static": "quantize_static",
    "openvino nncf int8": "OpenVINO NNCF",
}


def lines() -> list[str]:
    """Return the tables."""
    document = load("encoders_real_size")
    machine, versions = document["machine"], document["versions"]
    intro = (
        f"**Encoders of real size in int8**, {machine['processor']} with VNNI, random weights, "
        f"ONNX Runtime {versions['onnxruntime']}, OpenVINO {versions['openvino']}: the fastest of "
        "mmedge's variants beside the fastest int8 peer, wall time over wall time of one "
        "interleaved run with its 95 % interval, below 1 mmedge is faster. Cosines with fp32 on "
        "held-out samples compare the arithmetic, no accuracy; memory is the peak of a process "
        "that opens the graph and runs it. In transformers NNCF quantizes the products of queries "
        "with keys too, and is further from fp32; so the last column is over the fastest int8 "
        "peer whose cosine is no lower than that of mmedge's variant."
    )
    head = [
        "", "batch, threads", "mmedge", "fastest int8 peer", "over it", "over ONNX Runtime fp32",
        "cosine, peer's", "MiB, peer's", "over the fastest as near to fp32",
    ]  # fmt: skip
    results: Mapping[str, Any] = document["results"]
    rows = [_row(key, results[key]) for key in _ordered(results)]
    each = (
        "Every int8 contestant at batch 1 with one thread: wall ms, mean cosine, peak MiB. Peers "
        "have their own defaults, `quantize_static` among them, which quantizes softmax, norms "
        "and additions too."
    )
    shown = [key for key in _ordered(results) if key.endswith(", batch 1, threads 1")]
    cells = [[_title(key), *_cells(results[key])] for key in shown]
    heads = ["", *_OURS.values(), *_PEERS.values()]
    return [intro, "", *table(head, rows), "", each, "", *table(heads, cells)]


def _ordered(results: Mapping[str, Any]) -> list[str]:
    names = list(SUBJECTS)
    return sorted(results, key=lambda key: (names.index(key.split(",")[0]), key))


def _title(key: str) -> str:
    return SUBJECTS[key.split(",", maxsplit=1)[0]]


def _row(key: str, run: Mapping[str, Any]) -> list[str]:
    _, batch, threads = key.split(", ")
    found = run["contestants"]

    def fastest(names: Mapping[str, str]) -> str:
        return min(
            (name for name in names if name in found), key=lambda name: found[name]["wall_p50_ms"]
        )

    ours, peer = fastest(_OURS), fastest(_PEERS)
    ratios = run["ratios"]
    near = {
        name: title
        for name, title in _PEERS.items()
        if name in found and found[name]["cosine_mean"] >= found[ours]["cosine_mean"]
    }
    rival = fastest(near) if near else ""
    return [
        _title(key),
        f"{batch.split()[1]}, {threads.split()[1]}",
        f"{_OURS[ours]}, {found[ours]['wall_p50_ms']:.1f} ms",
        f"{_PEERS[peer]}, {found[peer]['wall_p50_ms']:.1f} ms",
        ratio_cell(ratios[f"{ours} / {peer}"]["wall"]),
        f"{ratios[f'{ours} / onnxruntime fp32']['wall']['median']:.2f}",
        f"{found[ours]['cosine_mean']:.4f}, {found[peer]['cosine_mean']:.4f}",
        f"{found[ours]['peak_rss_mib']:.0f}, {found[peer]['peak_rss_mib']:.0f}",
        f"{near[rival]}: {ratio_cell(ratios[f'{ours} / {rival}']['wall'])}" if near else "none is",
    ]


def _cells(run: Mapping[str, Any]) -> list[str]:
    found = run["contestants"]
    return [
        f"{found[name]['wall_p50_ms']:.1f}, {found[name]['cosine_mean']:.4f}, "
        f"{found[name]['peak_rss_mib']:.0f}"
        if name in found
        else ""
        for name in (*_OURS, *_PEERS)
    ]
