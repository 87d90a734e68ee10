"""convert(): a request is checked before torch is imported."""

from __future__ import annotations

from mmedge.bundle.creating import check_target
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.datasets import Dataset, read_dataset
from mmedge.converters.families import check_supported
from mmedge.converters.progress import Progress, ProgressEvent, ignore_progress
from mmedge.converters.report import ConversionReport
from mmedge.converters.sources.source import Source, is_hub_id, open_source
from mmedge.energy.counter import unavailable_reason
from mmedge.errors import ConversionError

__all__ = ["convert", "read_data"]


def convert(config: ConvertConfig, progress: Progress | None = None) -> ConversionReport:
    """Convert a model to a bundle, atomically.

    Args:
        config: Settings.
        progress: Progress callback, run in the calling thread.

    Raises:
        ConversionError: If the source, the data or the model cannot be converted (SourceError,
            CalibrationError, ExportError, QuantizationError, ParityError).
        BackendError: If ONNX Runtime cannot run what was made.
        BundleError: If `config.out` cannot hold the bundle.
        StorageError: If the disk is full or the place cannot be written.
    """
    report = progress or ignore_progress
    check_target(config.out, overwrite=config.overwrite)
    if config.searches and config.objective == "energy" and (reason := unavailable_reason()):
        raise ConversionError(f"Objective energy: {reason}")
    source = None if is_hub_id(config.source) else _open(config, report)
    data = read_data(config)
    if config.metric is not None:
        from mmedge.converters.evaluation.base import all_metrics, find_metric

        find_metric(config.metric, all_metrics())
    source = source or _open(config, report)
    from mmedge.converters.described import describe
    from mmedge.converters.pipeline import convert_model

    return convert_model(config, data, lambda: describe(source, report), report)


def read_data(config: ConvertConfig) -> dict[str, Dataset]:
    """Return the given calibration and evaluation data, by these names.

    Raises:
        CalibrationError: If there is none at a path.
    """
    paths = {"calibration": config.calibration, "evaluation": config.evaluate}
    return {what: read_dataset(path) for what, path in paths.items() if path is not None}


def _open(config: ConvertConfig, report: Progress) -> Source:
    report(ProgressEvent("Open the source", 0, 1))
    return open_source(
        config.source,
        config.revision,
        merge_adapter=config.merge_adapter,
        check=check_supported,
    )
