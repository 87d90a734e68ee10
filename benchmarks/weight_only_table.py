"""Tables of benchmarks/weight_only.py's record, for the documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from presenting import load, ratio_cell, table

__all__ = ["page", "summary"]

_SUMMARY = (
    "int4-g128",
    "int4-g128-gptq",
    "int4-g128-gptq-at25",
    "onnxruntime int4-g128",
)
_PARTS = {"decoder": "decoder, 124 M", "encoder": "ViT-L/14, 304 M"}


def summary() -> list[str]:
    """Return the lines for docs/benchmarks.md."""
    document = load("weight_only")
    results = document["results"]
    intro = (
        "Int4 weight-only in groups of 128 beside ONNX Runtime's own: size over fp16, mean cosine "
        "with fp32, wall time over fp32 in one interleaved run "
        f"({_machine(document)}). The image encoder of "
        "the shapes CLIP is trained; a decoder of GPT-2's size and the image encoder of ViT-L/14 "
        "have random weights, whose cosines are weak evidence. More: "
        "[weight-only.md](weight-only.md)."
    )
    head = [
        "",
        "shapes CLIP: size, cosine",
        "decoder: size, cosine",
        "one token over fp32",
        "ViT-L/14: size, cosine",
        "one image over fp32",
    ]
    rows = [
        [
            name,
            _fidelity(results["trained"]["contestants"][name]["image"]),
            _fidelity(results["decoder"]["contestants"][name]),
            _time(results["decoder"], "1 token", name),
            _fidelity(results["encoder"]["contestants"][name]),
            _time(results["encoder"], "1 image", name),
        ]
        for name in _SUMMARY
    ]
    return [intro, "", *table(head, rows)]


def page() -> str:
    """Return the section of docs/weight-only.md."""
    document = load("weight_only")
    results = document["results"]
    lines = [
        (
            f"{_machine(document)}, load average "
            f"{document['machine']['load_average_1min']:.0f}; ONNX Runtime "
            f"{document['versions']['onnxruntime']}, whose own int4 is its `MatMulNBitsQuantizer`, "
            "named here as our recipes are."
        ),
        "",
        *_trained(results["trained"]),
        "",
        (
            "Random weights, which tell size and time; their cosines (decoder: of the logits of "
            f"the last token over {results['decoder']['samples']} sequences; ViT-L/14: of the "
            f"embeddings of {results['encoder']['samples']} images) are weak evidence:"
        ),
        "",
        *_full_size(results),
    ]
    for part, title in _PARTS.items():
        lines += ["", *_times(results[part], title)]
    return "\n".join(lines)


def _machine(document: Mapping[str, Any]) -> str:
    machine, threads = document["machine"], document["results"]["threads"]
    vnni = "" if machine["int8_instructions"] else " without VNNI"
    return f"{machine['processor']}{vnni}, {threads} thread"


def _trained(results: Mapping[str, Any]) -> list[str]:
    intro = (
        "Both encoders of the trained shapes CLIP: size over fp16 and mean cosine with float32 on "
        f"{results['samples']} scenes of the test split, and recall@1 of both together (float32: "
        f"{results['recall_at_1_fp32']:.3f}). GPTQ and the choice of layers for 2 bits saw scenes "
        "of the calibration split."
    )
    head = ["", "image: size", "cosine", "text: size", "cosine", "recall@1"]
    rows = [
        [
            name,
            *(
                f"{found[side][what]:.{digits}f}"
                for side in ("image", "text")
                for what, digits in (("size_to_fp16", 3), ("cosine_mean", 5))
            ),
            f"{found['recall_at_1']:.3f}",
        ]
        for name, found in results["contestants"].items()
    ]
    return [intro, "", *table(head, rows)]


def _full_size(results: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys(name for part in _PARTS for name in results[part]["contestants"])
    head = ["", *(f"{title}: {what}" for title in _PARTS.values() for what in ("size", "cosine"))]
    head += [f"at 2 bits, {part}" for part in _PARTS]
    rows = []
    for name in names:
        found = [results[part]["contestants"].get(name) for part in _PARTS]
        row = [name]
        for one in found:
            row += ["", ""] if one is None else [f"{one['size_to_fp16']:.4f}", _cosine(one)]
        rows.append([*row, *(_lowered(one) for one in found)])
    return table(head, rows)


def _times(results: Mapping[str, Any], title: str) -> list[str]:
    feeds = results["times"]
    names = next(iter(feeds.values()))
    head = [title, *(f"{about}: {what}" for about in feeds for what in ("ms", "over fp32"))]
    rows = []
    for name in names:
        cells = [name]
        for found in feeds.values():
            one = found[name]
            cells += [f"{one['wall_p50_ms']:.1f}", ratio_cell(one["ratio_to_fp32"])]
        rows.append(cells)
    return table(head, rows)


def _fidelity(found: Mapping[str, Any]) -> str:
    return f"{found['size_to_fp16']:.3f}, {_cosine(found)}"


def _cosine(found: Mapping[str, Any]) -> str:
    return f"{found['cosine_mean']:.4f}"


def _time(results: Mapping[str, Any], about: str, name: str) -> str:
    found = results["times"][about].get(name)
    return "" if found is None else ratio_cell(found["ratio_to_fp32"])


def _lowered(found: Mapping[str, Any] | None) -> str:
    """Return how many layers of each kind have half the bits."""
    names = () if found is None else found.get("lowered", ())
    kinds = Counter(name.rsplit(".", 1)[-1] for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
