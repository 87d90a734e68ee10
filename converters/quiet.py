"""Log levels of third-party libraries during a conversion."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries"]

# The same messages at every export: torchvision is missing, a default was used.
_TALKATIVE = (
    "torch.onnx._internal.exporter._registration",
    "torch.onnx._internal.exporter._core",
    "onnxscript.optimizer",
    "onnx_ir",
    "optimum.exporters.tasks",
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Raise the log level of the exporters and drop the progress bars of transformers."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # torch.export copies its own deprecated tree specs.
            warnings.filterwarnings(
                "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
            )
            # Two inputs that share an axis, as they are meant to.
            warnings.filterwarnings("ignore", message="# The axis name: ", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
