"""Weights of a stripped engine, restored from the ONNX file it was built from.

Such an engine is deserialized as any other and must be refitted before it is run (TensorRT's
developer guide, "Weight-Stripped Engine Generation").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedge.runtimes.trt.reasons import parser_errors

__all__ = ["put_weights"]

_SHOWN = 3


def put_weights(module: Any, logger: Any, engine: Any, model: Path) -> str:  # noqa: ANN401
    """Refit a stripped engine with weights.

    Args:
        module: The TensorRT.
        logger: Logger of the library.
        engine: ICudaEngine, of which nothing runs.
        model: The very ONNX file that it was built from; external data is found beside it.

    Returns:
        Why it could not be done, as far as TensorRT tells that elsewhere than to its logger; "" if
        every weight is in.
    """
    try:
        refitter = module.Refitter(engine, logger)
    except TypeError:  # from a null pointer
        return "the engine takes no weights"
    parser = module.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(model)):
        return parser_errors(parser) or "the weights of the ONNX file are not taken"
    if missing := list(refitter.get_missing_weights()):
        more = "" if len(missing) <= _SHOWN else f" and {len(missing) - _SHOWN} more"
        return f"the ONNX file lacks the weights {', '.join(missing[:_SHOWN])}{more}"
    return "" if refitter.refit_cuda_engine() else "the weights were not put in"
