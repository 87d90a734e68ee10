"""Candidates of a search as its tests want them, with and without files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from towers import image_tower

from mmedge.bundle.quality import Figure, Parity, Quality
from mmedge.bundle.tuning import Speed
from mmedge.converters.methods.recipes import parse_recipe
from mmedge.converters.tuning.pareto import Trial
from mmedge.converters.variants.builder import BuiltVariant, keeping

PARITY = Parity(max_abs_error=1e-3, cosine_mean=0.9995, cosine_min=0.999, samples=7)


def figure(value: float, width: float = 0.0) -> Figure:
    return Figure(value=value, low=value - width, high=value + width)


def quality(drop: float, cosine: float = 0.9999) -> Quality:
    """What was measured of a candidate that loses so much of recall@1."""
    figures = {"cosine_mean": figure(cosine), "recall@1": figure(0.7 - drop)}
    drops = {"recall@1": figure(drop, 0.001)}
    return Quality(figures=figures, drops=drops, samples=200, data="held-out: 200")


def speed(ratio: float, width: float = 0.01, energy_mj: float | None = None) -> Speed:
    return Speed(
        backend="onnxruntime",
        latency_ms=10 * ratio,
        ratio=figure(ratio, width),
        energy_mj=energy_mj,
    )


def trial(
    name: str,
    drop: float | None,
    ratio: float | None = None,
    size_bytes: int | None = 1000,
    *,
    cosine: float = 0.9999,
    energy_mj: float | None = None,
    failure: str = "",
) -> Trial:
    """A candidate of figures alone; without a drop it could not be made."""
    failed = drop is None
    return Trial(
        recipe=parse_recipe(name),
        built=None,
        quality=None if drop is None else quality(drop, cosine),
        drop=None if drop is None else figure(drop),
        size_bytes=None if failed else size_bytes,
        speed=None if ratio is None else speed(ratio, energy_mj=energy_mj),
        failure=failure,
    )


def fp32_trial(energy_mj: float | None = None) -> Trial:
    return trial("fp32", 0.0, 1.0, 1000, cosine=1.0, energy_mj=energy_mj)


def built(name: str, folder: Path, keep: tuple[str, ...] = ()) -> BuiltVariant:
    """A variant with real files: a small tower, whatever the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = parse_recipe(name)
    layouts = list(recipe.methods) or ["portable"]
    models = {layout: image_tower(folder / f"{name}.{layout}.onnx") for layout in layouts}
    nodes = folder / f"{name}.nodes.json"
    nodes.write_text("{}")
    if keep:
        methods = {layout: keeping(m, keep) for layout, m in recipe.methods.items()}
        recipe = replace(recipe, methods=methods)
    rng = np.random.default_rng(len(name))
    return BuiltVariant(
        recipe=recipe,
        models=models,
        nodes=nodes,
        opset=20,
        parity=PARITY,
        golden={"embedding": rng.standard_normal((4, 16)).astype(np.float32)},
        collected={"embedding": rng.standard_normal((5, 16)).astype(np.float32)},
        duration_s=1.5,
    )
