"""Calibration statistics of a role's graphs, each collected once."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import onnx_ir as ir

from mmedge.converters.methods.configs import Equalization, RangeMethod
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes.float16 import Peak
from mmedge.converters.statistics.collect import (
    ChannelStatistics,
    Feeds,
    collect_channels,
    collect_moments,
    collect_ranges,
    cut_ranges,
)
from mmedge.converters.statistics.equalization import Scales, choose_scales
from mmedge.converters.statistics.peaks import collect_peaks
from mmedge.files import storage_errors
from mmedge.specs import Array

__all__ = ["Calibrator"]

T = TypeVar("T")


class Calibrator:
    """Statistics over a stream of calibration feeds, cached by graph.

    A search makes a dozen variants of one graph; most of them need the same ranges. Nothing is
    remembered but statistics, and second moments not even these: they are large.

    The layouts of a role differ in operators alone: a value of one name is the same in all of
    them, and so are its range and its channels.
    """

    def __init__(self, feeds: Feeds, layouts: Collection[Path] = ()) -> None:
        """Set the calibration data.

        Args:
            feeds: Starts a stream of feeds; called once for each reading of the data.
            layouts: Graphs that share their statistics: the layouts of one role.
        """
        self._feeds = feeds
        self._shared: dict[Path, Hashable] = dict.fromkeys(layouts, "layouts")
        self._ranges: dict[tuple[Hashable, RangeMethod, bool], dict[str, Range]] = {}
        self._channels: dict[Hashable, dict[str, ChannelStatistics]] = {}
        self._peaks: dict[Path, dict[str, Peak]] = {}
        self._scales: dict[tuple[Equalization, str], Scales] = {}
        self._equalized: dict[tuple[Path, Equalization, str], Path] = {}

    def __call__(self) -> Iterable[Mapping[str, Array]]:
        """Start the stream."""
        return self._feeds()

    def ranges(
        self, model: Path, names: Sequence[str], method: RangeMethod, *, symmetric: bool
    ) -> dict[str, Range]:
        """Return the ranges of named values; see statistics.collect_ranges."""
        key = self._shared.get(model, model)
        extremes = self._ranges.setdefault((key, "minmax", False), {})
        if missing := _missing(names, extremes):
            extremes |= collect_ranges(model, missing, self._feeds)
        if method == "minmax":
            return {name: extremes[name] for name in names}
        known = self._ranges.setdefault((key, method, symmetric), {})
        if missing := _missing(names, known):
            found = {name: extremes[name] for name in missing}
            known |= cut_ranges(model, found, self._feeds, method=method, symmetric=symmetric)
        return {name: known[name] for name in names}

    def channels(self, model: Path, names: Sequence[str]) -> dict[str, ChannelStatistics]:
        """Return the channel statistics of named values; see statistics.collect_channels."""
        known = self._channels.setdefault(self._shared.get(model, model), {})
        if missing := _missing(names, known):
            known |= collect_channels(model, missing, self._feeds)
        return {name: known[name] for name in names}

    def moments(self, model: Path, names: Sequence[str]) -> dict[str, Array]:
        """Return the second moments of named values; see statistics.collect_moments."""
        return collect_moments(model, list(dict.fromkeys(names)), self._feeds)

    def peaks(self, model: Path) -> dict[str, Peak]:
        """Return the peaks of every float value; see peaks.collect_peaks."""
        if model not in self._peaks:
            self._peaks[model] = collect_peaks(model, self._feeds)
        return self._peaks[model]

    def equalized(
        self, model: Path, config: Equalization, activations: Literal["uint8", "int8"]
    ) -> Path:
        """Return the equalized graph, beside `model`.

        The scales are chosen once, from the first requested layout, and apply by the names of
        the layers, which all layouts of a role share. `close` removes the file.
        """
        key = (model, config, activations)
        if key not in self._equalized:
            out = model.with_name(f".{model.stem}.{activations}-{len(self._equalized)}.onnx")
            scales = self._scales.get((config, activations))
            if scales is None:
                scales = choose_scales(model, self._feeds, config, activations=activations)
                self._scales[config, activations] = scales
            graph = ir.load(model)
            scales.step()(graph)
            self._equalized[key] = out
            self._shared[out] = (self._shared.get(model, model), config, activations)
            with storage_errors(out):
                ir.save(graph, out, external_data=f"{out.name}.data")
        return self._equalized[key]

    def close(self) -> None:
        """Remove intermediate graphs."""
        for path in self._equalized.values():
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        self._equalized.clear()


def _missing(names: Sequence[str], known: Mapping[str, T]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name not in known]
