"""Cheap checks of a conversion, without torch or the network."""

from __future__ import annotations

from mmedge.bundle.creating import check_target
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.datasets import read_dataset
from mmedge.converters.sources.source import is_hub_id, open_source
from mmedge.energy.counter import why_not
from mmedge.errors import ConversionError

__all__ = ["check_request"]


def check_request(config: ConvertConfig) -> None:
    """Check output, source and data of a conversion before anything heavy is imported.

    Raises:
        BundleError: If no bundle can be created at `config.out`.
        ConversionError: If the objective cannot be measured (SourceError:
            a local source cannot be opened; CalibrationError: no data at a path).
    """
    check_target(config.out, overwrite=config.overwrite)
    if config.searches and config.objective == "energy" and (reason := why_not()):
        raise ConversionError(f"Objective energy: {reason}")
    if not is_hub_id(config.source):
        open_source(config.source, config.revision, merge_adapter=config.merge_adapter)
    for data in (config.calibration, config.evaluate):
        if data is not None:
            read_dataset(data)
