"""Weights of a stripped engine, restored from its ONNX file before it runs.

See "Weight-Stripped Engine Generation" in TensorRT's developer guide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedge.runtimes.trt.reasons import parser_errors

__all__ = ["put_weights"]

_MAX_SHOWN = 3


def put_weights(module: Any, logger: Any, engine: Any, model: Path) -> str:  # noqa: ANN401
    """Refit a stripped engine with weights.

    Args:
        module: TensorRT's module.
        logger: Its logger.
        engine: ICudaEngine, not running.
        model: The ONNX file that it was built from; external data is found beside it.

    Returns:
        The reason of a failure, beside what TensorRT logs; "" on success.
    """
    try:
        refitter = module.Refitter(engine, logger)
    except TypeError:  # from a null pointer
        return "the engine is not refittable"
    parser = module.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(model)):
        return parser_errors(parser) or "the weights of the ONNX file are rejected"
    if missing := list(refitter.get_missing_weights()):
        more = "" if len(missing) <= _MAX_SHOWN else f" and {len(missing) - _MAX_SHOWN} more"
        return f"the ONNX file lacks the weights {', '.join(missing[:_MAX_SHOWN])}{more}"
    return "" if refitter.refit_cuda_engine() else "refitting failed"
