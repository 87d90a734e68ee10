"""The benchmark section of the README, made from benchmarks/results/*.json.

python benchmarks/table.py          # prints it
python benchmarks/table.py --write  # puts it between the README's markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import RESULTS

__all__ = ["BEGIN", "END", "section"]

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- made by benchmarks/table.py: begin -->"
END = "<!-- made by benchmarks/table.py: end -->"
_RACES = {
    "image_batch_1": "image, batch 1",
    "image_batch_8": "image, batch 8",
    "text_12_tokens": "text, 12 tokens",
    "text_77_tokens": "text, 77 tokens",
}
_FP32 = ("torch eager", "torch.compile", "onnxruntime fp32", "openvino fp32")
_INT8 = ("onnxruntime quantize_dynamic", "onnxruntime quantize_static u8", "openvino nncf int8")
_PEERS = {"mmedge fp32": _FP32, "mmedge int8-dynamic": _INT8, "mmedge int8-static": _INT8}


def section() -> str:
    """Return the section as Markdown."""
    speed, cold, over = (_load(name) for name in ("clip_cpu", "cold_start", "encode_overhead"))
    results = speed["results"]
    intro = (
        f"Full-size ViT-B/32 CLIP with random weights, {speed['machine']['processor']}, "
        f"{results['threads']} thread. Wall time of mmedge over that of the peer: below 1 mmedge "
        "is faster. Median over the rounds of one interleaved run, 95 % interval in brackets."
    )
    lines = [intro, "", *_table(["", "peer", *_RACES.values()], _ratios(results))]
    lines += [
        "",
        "Mean cosine with torch's embedding on held-out inputs, int8 of the same run:",
        "",
    ]
    lines += _table(["", *_RACES.values()], _cosines(results))
    lines += [
        "",
        (
            "From process start to the first image embedding, both towers loaded but where said "
            f"otherwise (median of {cold['results']['rounds']} starts):"
        ),
        "",
    ]
    starts = [
        [
            name,
            f"{figures['wall_s']:.2f}",
            f"{figures['cpu_s']:.2f}",
            f"{figures['peak_rss_mib']:.0f}",
        ]
        for name, figures in cold["results"].items()
        if isinstance(figures, dict)
    ]
    lines += _table(["", "wall, s", "CPU, s", "peak memory, MiB"], starts)
    shares = ", ".join(
        f"{name} {100 * over['results'][name]['overhead_share']:+.1f} %"
        for name in ("fp32", "int8")
    )
    wrapper_us = 1e3 * over["results"]["session_run_alone"]["overhead_p50_ms"]
    overhead = (
        f"`encode_image` on a ready tensor, batch 1, over the bare session call: {shares} of the "
        f"call, noise included; the session wrapper alone costs {wrapper_us:.1f} µs."
    )
    return "\n".join([*lines, "", overhead, "", _calibration()])


def _calibration() -> str:
    results = _load("calibration_memory")["results"]
    few, many = sorted((name for name in results if name.isdigit()), key=int)
    encoder = {"small": "the shapes CLIP", "full": "full-size ViT-B/32"}[results["size"]]
    return (
        f"Calibrating the image encoder of {encoder} to static int8 ({results['ranges']} ranges, "
        f"{results['picture_size']} pictures) peaks at {results[few]['peak_rss_mib']:.0f} MiB with "
        f"{int(few):,} pictures and at {results[many]['peak_rss_mib']:.0f} MiB with {int(many):,}: "
        "what grows is the list of files and the hashes that tell whether pictures repeat."
    )


def _ratios(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for ours, peers in _PEERS.items():
        for peer in peers:
            pairs = (results[race]["ratios"].get(f"{ours} / {peer}") for race in _RACES)
            cells = ("" if pair is None else _cell(pair["wall"]) for pair in pairs)
            rows.append([ours, peer, *cells])
    return rows


def _cosines(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in ("mmedge int8-dynamic", "mmedge int8-static", *_INT8):
        found = (results[race]["contestants"].get(name) for race in _RACES)
        rows.append([name, *("" if f is None else f"{f['cosine_mean']:.5f}" for f in found)])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return document


def _cell(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def main() -> None:
    """Print the section, or write it into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the README's section")
    if not parser.parse_args().write:
        print(section())
        return
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{section()}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
