"""Writes docs/families.md: every family converted at a tiny size, its variants run, engines built.

python checks/family_table.py            # all families, some minutes
python checks/family_table.py clip vit   # prints the rows of these

A family's row shows what its converter and graphs can do, on random weights: nothing about accuracy
or speed. Needs the extras [convert,cpu,dev]; without TensorRT-RTX the engines are left out.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmedge.bundle import open_bundle
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.families import FAMILIES
from mmedge.errors import MmedgeError
from mmedge.sessions.verification import verify_bundle

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "converters")]
# What writes tiny models for the tests.
tiny_bert_text: Any = importlib.import_module("models.tiny_bert_text")
tiny_models: Any = importlib.import_module("models.tiny_models")
tiny_naflex: Any = importlib.import_module("models.tiny_naflex")
tiny_video: Any = importlib.import_module("models.tiny_video")
tiny_eva_clip: Any = importlib.import_module("models.tiny_eva_clip")
open_clip_cases: Any = importlib.import_module("families.open_clip_cases")

PRECISIONS = ("fp16", "int8-dynamic")  # those that need no data
_ENGINE = ("--target", "tensorrt-rtx", "--compute-capability", "8.9", "--quiet")


def _write_open_clip(folder: Path) -> object:
    recorded = json.loads(open_clip_cases.RECORDED.read_text("utf-8"))
    case, shapes = open_clip_cases.CASES["vit"], recorded["vit"]["shapes"]
    return open_clip_cases.write_checkpoint(folder, case, shapes)


# Writes the tiny source of a family. An ONNX file is its own source: the family "onnx" has none.
WRITERS: dict[str, Callable[[Path], object]] = {
    **{name: partial(tiny_bert_text.write_model, name) for name in tiny_bert_text.MODELS},
    "causal_lm": tiny_models.write_gpt2,
    "clap": tiny_models.write_clap,
    "clip": tiny_models.write_clip,
    "dinov2": tiny_models.write_dinov2,
    "eva_clip": tiny_eva_clip.write_eva_clip,
    "open_clip": _write_open_clip,
    "owlv2": partial(tiny_models.write_owl, second=True),
    "owlvit": tiny_models.write_owl,
    "resnet": tiny_models.write_resnet,
    "rt_detr": tiny_models.write_rt_detr,
    "rt_detr_v2": partial(tiny_models.write_rt_detr, second=True),
    "sentence_transformers": tiny_models.write_sentence_transformer,
    "siglip": tiny_models.write_siglip,
    "siglip2": tiny_naflex.write_naflex,
    "vit": tiny_models.write_vit,
    "xclip": tiny_video.write_xclip,
}
# Tests that stand under another name than their family's.
_TESTS = {
    **dict.fromkeys(tiny_bert_text.MODELS, "families_bert_text"),
    **dict.fromkeys(("clip", "siglip"), "families"),
    "owlv2": "families_owlvit",
    "rt_detr_v2": "families_rt_detr",
}
_HEAD = """# Families

Made by `python checks/family_table.py`: each family at a tiny size with random weights is
converted, every variant replays its golden vectors, and TensorRT-RTX builds its engines for
compute capability 8.9. So a row says what can be converted and run, and nothing about accuracy or
speed; [sources.md](sources.md) says what each takes, [cpu-speed.md](cpu-speed.md) what was
measured at real sizes. *Parity* is the largest absolute difference of the exported graph's
outputs to PyTorch's. The test of a family compares it with the reference implementation from raw
inputs on.

| family | bundle | roles | parity | precisions that run | engines | test |
| --- | --- | --- | --- | --- | --- | --- |
"""


def row(name: str, place: Path) -> str:
    """Return the table's row of a family."""
    source, bundle = place / "source", place / "made.mmedge"
    WRITERS[name](source)
    report = convert(ConvertConfig(str(source), bundle, precisions=("fp32",)))
    manifest = open_bundle(bundle).manifest
    errors = [each.parity.max_abs_error for each in report.variants if each.parity is not None]
    ran = {role: ["fp32"] for role in manifest.roles}
    engines = "fp32" if _builds(bundle) else "none"
    for precision in PRECISIONS:
        tried = place / f"{precision}.mmedge"
        for role in _convertible(source, tried, precision, tuple(manifest.roles)):
            ran[role].append(precision)
    test = f"test_{_TESTS.get(name, f'families_{name}')}.py"
    cells = (
        f"`{name}`",
        manifest.kind.type,
        ", ".join(manifest.roles),
        f"{max(errors):.0e}",
        _common(ran),
        engines,
        f"[{test}](../tests/converters/families/{test})",
    )
    return f"| {' | '.join(cells)} |"


def _convertible(source: Path, bundle: Path, precision: str, roles: Sequence[str]) -> Iterator[str]:
    """Yield the roles that convert to a precision and replay their golden vectors in it."""
    try:
        convert(ConvertConfig(str(source), bundle, precisions=("fp32", precision)))
    except MmedgeError as error:
        if len(roles) == 1:
            print(f"  {roles[0]}, {precision}: {error}", file=sys.stderr)
            return
        for role in roles:
            alone = bundle.with_name(f"{role}-{bundle.name}")
            chosen = ("fp32", f"{role}:fp32", f"{role}:{precision}")
            try:
                convert(ConvertConfig(str(source), alone, precisions=chosen))
            except MmedgeError as reason:
                print(f"  {role}, {precision}: {reason}", file=sys.stderr)
            else:
                yield from _passed(alone, precision)
    else:
        yield from _passed(bundle, precision)


def _passed(bundle: Path, precision: str) -> Iterator[str]:
    for result in verify_bundle(open_bundle(bundle)):
        if result.passed and result.variant.startswith(precision):
            yield result.role


def _common(ran: dict[str, list[str]]) -> str:
    """Return the precisions of all roles, and those of some with their names."""
    every = ["fp32", *PRECISIONS]
    common = [each for each in every if all(each in one for one in ran.values())]
    some = [
        f"{each} ({', '.join(role for role, one in ran.items() if each in one)})"
        for each in every
        if each not in common and any(each in one for one in ran.values())
    ]
    return ", ".join(common + some)


def _builds(bundle: Path) -> bool:
    """Return whether TensorRT-RTX builds engines of all roles in fp32."""
    command = [sys.executable, "-m", "mmedge", "build", str(bundle), "--precision", "fp32"]
    environment = os.environ | {"MMEDGE_CACHE_DIR": str(bundle.parent / "cache")}
    done = subprocess.run(
        [*command, *_ENGINE], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"  engines: {done.stderr.strip()[-300:]}", file=sys.stderr)
    return not done.returncode


def main() -> None:
    """Write the page, or print some rows."""
    names = sys.argv[1:] or [name for name in sorted(FAMILIES) if name in WRITERS]
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row(name, Path(place)))
        print(rows[-1], flush=True)
    if not sys.argv[1:]:
        (ROOT / "docs" / "families.md").write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
