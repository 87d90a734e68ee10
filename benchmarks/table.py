"""The benchmark sections of README and docs, made from benchmarks/results/*.json.

python benchmarks/table.py README.md  # prints that of one document; of all without a name
python benchmarks/table.py --write    # puts each between the markers of its document
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import real_size_table
import retrieval_table
import weight_only_table
from presenting import load, ratio_cell, table
from record import RESULTS

__all__ = ["BEGIN", "END", "section", "summary"]

_ROOT = Path(__file__).parents[1]
BEGIN = "<!-- made by benchmarks/table.py: begin -->"
END = "<!-- made by benchmarks/table.py: end -->"
_RACES = {
    "image_batch_1": "image, batch 1",
    "image_batch_8": "image, batch 8",
    "text_8_tokens": "text, 8 tokens",
    "text_12_tokens": "text, 12 tokens",
    "text_16_tokens": "text, 16 tokens",
    "text_32_tokens": "text, 32 tokens",
    "text_77_tokens": "text, 77 tokens",
}
_MODELS = {"": "ViT-B/32", "_b16": "ViT-B/16"}
# Recorded on machines of three kinds: by the beginning of the file's name.
_MACHINES = {
    "clip_cpu": "with VNNI",
    "clip_cpu_amx": "with AMX",
    "clip_cpu_without_vnni": (
        "without VNNI, where the fast int8 kernels saturate unless weights are "
        "[paired](quantization.md#processors-without-vnni)"
    ),
}
_FP32 = ("torch eager", "torch.compile", "onnxruntime fp32", "openvino fp32")
_INT8 = ("onnxruntime quantize_dynamic", "onnxruntime quantize_static u8", "openvino nncf int8")
_OUR_FP32 = {"mmedge fp32": "ONNX Runtime", "mmedge fp32 in openvino": "OpenVINO"}
_OUR_INT8 = {
    "mmedge int8-dynamic": "int8-dynamic",
    "mmedge int8-dynamic-paired": "int8-dynamic-paired",
    "mmedge int8-static": "int8-static",
    "mmedge int8-static qdq in openvino": "int8-static in OpenVINO",
}


_INTRO = (
    "Full-size CLIP with random weights, one thread. Wall time of mmedge over that of the fastest "
    "peer of the same run: below 1 mmedge is faster. Median over the rounds of one interleaved "
    "run, 95 % interval in brackets. Peers in fp32: torch, torch.compile, ONNX Runtime, OpenVINO; "
    "in int8: ONNX Runtime's quantize_dynamic and quantize_static, OpenVINO with NNCF. Two floors, "
    "for the fastest of ours: the encoder's operations at the int8 rate of one large product in "
    "the caches, computed; and its int8 products alone, in their sizes and with weights of their "
    "own that come from memory, measured in the same rounds."
)


def speed_page() -> str:
    """Return the tables of every machine, for docs/cpu-speed.md."""
    lines = [_INTRO]
    for machine, kind in _MACHINES.items():
        lines += ["", *_speed(machine, kind)]
    return "\n".join([*lines, "", *real_size_table.lines()])


def summary() -> str:
    """Return the section of the README: one table, medians alone."""
    cells: dict[str, list[str]] = {}
    heads = [""]
    for machine, kind in _MACHINES.items():
        short = kind.split(",")[0]
        heads += [f"{short}: fp32", f"{short}: int8"]
        found = {
            model: load(f"{machine}{model}")["results"]
            for model in _MODELS
            if (RESULTS / f"{machine}{model}.json").is_file()
        }
        rows = dict(_races(found))
        for title in rows.keys() | cells.keys():
            known = cells.setdefault(title, [""] * (len(heads) - 3))
            known += _medians(rows[title]) if title in rows else ["", ""]
    titles = [f"{model} {race}" for model in _MODELS.values() for race in _RACES.values()]
    shown = [[title, *cells[title]] for title in titles if title in cells]
    intro = (
        "Full-size CLIP, one thread: wall time of mmedge in ONNX Runtime (fp32, int8-dynamic) over "
        "that of the fastest of its peers in the same precision (torch, torch.compile, ONNX "
        "Runtime, OpenVINO, NNCF). Below 1 mmedge is faster. x86 processors with VNNI, with AMX, "
        "and without either."
    )
    return "\n".join([intro, "", *table(heads, shown)])


def _medians(race: Mapping[str, Any]) -> list[str]:
    """Return how our fp32 and int8-dynamic stand to the fastest peer of each precision."""
    cells = []
    for name, peers in (("mmedge fp32", _FP32), ("mmedge int8-dynamic", _INT8)):
        peer = min(peers, key=lambda name: race["contestants"][name]["wall_p50_ms"])
        cells.append(f"{race['ratios'][f'{name} / {peer}']['wall']['median']:.2f}")
    return cells


def section() -> str:
    """Return the section of docs/benchmarks.md."""
    cold, over = (load(name) for name in ("cold_start", "encode_overhead"))
    lines = [
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
    lines += table(["", "wall, s", "CPU, s", "peak memory, MiB"], starts)
    shares = ", ".join(
        f"{name} {100 * over['results'][name]['overhead_share']:+.1f} %"
        for name in ("fp32", "int8")
    )
    wrapper_us = 1e3 * over["results"]["session_run_alone"]["overhead_p50_ms"]
    overhead = (
        f"`encode_image` on a ready tensor, batch 1, over the bare session call: {shares} of the "
        f"call, noise included; the session wrapper alone costs {wrapper_us:.1f} µs."
    )
    lines += ["", overhead, "", *_indexing(), "", _calibration(), "", *_search()]
    return "\n".join([*lines, "", *weight_only_table.summary()])


def _indexing() -> list[str]:
    document = load("indexing")
    results, host = document["results"], document["machine"]
    intro = (
        "Indexing a folder of JPEGs with ViT-B/32 in int8, from files to durable items: throughput "
        "over that of the encoder alone, on ready tensors at its best batch. "
        f"{host['processors_usable']} CPUs, {results['rounds']} interleaved rounds at a load "
        f"average of {host['load_average_1min']:.0f}. What decoding and resizing take of the CPUs "
        "the encoder cannot have: the bound is "
        "the encoder's CPU time over the sum. With the encoder on one CPU, as behind an "
        "accelerator, the others decode."
    )
    heads = [
        "",
        "the encoder as `mmedge.load` opens it",
        "a batch on each CPU, the fastest way",
        "the same by CPU time",
        "bound",
        "the encoder on one CPU",
    ]
    rows = [
        [
            name,
            ratio_cell(figures["throughput_over_loaded"]),
            ratio_cell(figures["throughput_over_bulk"]),
            ratio_cell(figures["cpu_time_ratio_to_bulk"]),
            f"{figures['bound']:.2f}",
            ratio_cell(figures["one_cpu"]["throughput_over_one_cpu"]),
        ]
        for name, figures in results.items()
        if isinstance(figures, dict) and "bound" in figures
    ]
    return [intro, "", *table(heads, rows)]


def _speed(machine: str, kind: str) -> list[str]:
    """Return the tables of one machine."""
    documents = {
        model: load(f"{machine}{model}")
        for model in _MODELS
        if (RESULTS / f"{machine}{model}.json").is_file()
    }
    if not documents:
        return []
    processor = next(iter(documents.values()))["machine"]["processor"]
    races = list(_races({model: found["results"] for model, found in documents.items()}))
    ours = {
        name: title
        for name, title in _OUR_INT8.items()
        if any(name in race["contestants"] for _, race in races)
    }
    heads = ["", "fastest peer", *ours.values(), "times the computed floor"]
    beside = (_floors(race, ours) for _, race in races)
    rows = [row + cells for row, cells in zip(_against(races, ours, _INT8), beside, strict=True)]
    if any("products_alone" in race for _, race in races):
        heads.append("times the products alone")
    return [
        f"**{processor}, {kind}**, fp32:",
        "",
        *table(["", "fastest peer", *_OUR_FP32.values()], _against(races, _OUR_FP32, _FP32)),
        "",
        "int8:",
        "",
        *table(heads, rows),
        "",
        "Mean cosine with torch's embedding on held-out inputs, int8 of the same runs:",
        "",
        *table(["", *ours.values(), *_INT8], _cosines(races, ours)),
    ]


def _search() -> list[str]:
    results = load("precision_search")["results"]
    intro = (
        "The search against ONNX Runtime's plain static int8, on trained models: `--precision auto "
        f"--max-drop {results['max_drop']}` on the shapes CLIP and on the same function with "
        "outliers in its activations. recall@1 on scenes that neither training, calibration nor "
        "the search has seen:"
    )
    rows = []
    for model, figures in results.items():
        if isinstance(figures, dict):
            chosen = ", ".join(f"{role}: {name}" for role, name in figures["chosen"].items())
            recalls = (figures[name]["recall@1"] for name in ("fp32", "auto", "naive int8"))
            rows.append([model, *(f"{recall:.3f}" for recall in recalls), chosen])
    return [intro, "", *table(["", "fp32", "auto", "naive int8", "what auto chose"], rows)]


def _calibration() -> str:
    results = load("calibration_memory")["results"]
    few, many = sorted((name for name in results if name.isdigit()), key=int)
    encoder = {"small": "the shapes CLIP", "full": "full-size ViT-B/32"}[results["size"]]
    return (
        f"Calibrating the image encoder of {encoder} to static int8 ({results['ranges']} ranges, "
        f"{results['picture_size']} images) peaks at {results[few]['peak_rss_mib']:.0f} MiB with "
        f"{int(few):,} images and at {results[many]['peak_rss_mib']:.0f} MiB with {int(many):,}: "
        "what grows is the list of files and the hashes that find repeated images."
    )


def _races(runs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for run, results in runs.items():
        for race, title in _RACES.items():
            # The text encoders of B/32 and B/16 are the same.
            again = run != "" and race.startswith("text")
            if race in results and not again:
                yield f"{_MODELS[run]} {title}", results[race]


def _against(
    races: Sequence[tuple[str, Any]], ours: Mapping[str, str], peers: Sequence[str]
) -> list[list[str]]:
    """Return a row for each benchmark: the fastest peer, and the ratio of each of ours to it."""
    rows = []
    for title, race in races:
        held = race["contestants"]
        peer = min(peers, key=lambda name: held[name]["wall_p50_ms"])
        found = (race["ratios"].get(f"{name} / {peer}") for name in ours)
        rows.append(
            [title, peer, *("" if pair is None else ratio_cell(pair["wall"]) for pair in found)]
        )
    return rows


def _floors(race: Mapping[str, Any], ours: Mapping[str, str]) -> list[str]:
    """Return the ratio of our best to each lower bound; the second is not in every run."""
    held = [race["contestants"][name] for name in ours if name in race["contestants"]]
    cells = [f"{min(one['times_the_floor'] for one in held):.2f}"]
    if "products_alone" in race:
        found = (one["times_the_products_alone"]["wall"] for one in held)
        cells.append(ratio_cell(min(found, key=lambda ratio: ratio["median"])))
    return cells


def _cosines(races: Sequence[tuple[str, Any]], ours: Mapping[str, str]) -> list[list[str]]:
    rows = []
    for title, race in races:
        found = (race["contestants"].get(name) for name in (*ours, *_INT8))
        rows.append([title, *("" if f is None else f"{f['cosine_mean']:.5f}" for f in found)])
    return rows


_DOCUMENTS: dict[str, Callable[[], str]] = {
    "README.md": summary,
    "docs/benchmarks.md": section,
    "docs/cpu-speed.md": speed_page,
    "docs/retrieval.md": retrieval_table.readers_section,
    "docs/scale.md": retrieval_table.scale_section,
    "docs/weight-only.md": weight_only_table.page,
}


def main() -> None:
    """Print sections, or write them into their documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="*", help=f"some of {', '.join(_DOCUMENTS)}")
    parser.add_argument("--write", action="store_true", help="replace the documents' sections")
    arguments = parser.parse_args()
    for name in arguments.documents or _DOCUMENTS:
        made, document = _DOCUMENTS[name](), _ROOT / name
        if not arguments.write:
            print(made)
            continue
        text = document.read_text("utf-8")
        before, rest = text.split(BEGIN)
        document.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
