"""Preprocessing models of an exported Triton repository, run inside the server.

Triton's Python backend imports a model's `model.py` and takes its class TritonPythonModel: the
exported files take one of the classes below for it, so the server's Python needs mmedge installed.
The module `triton_python_backend_utils` exists inside the server alone. Interface:
https://github.com/triton-inference-server/python_backend
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mmedge.errors import InputError, MmedgeError, TextError
from mmedge.exports.document import TOKENIZER_NAME
from mmedge.exports.triton_configs import FRAME, IMAGE, TEXT
from mmedge.preprocess.config import ImageConfig, ProcessorConfig, TextConfig
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import TextProcessor
from mmedge.specs import Array

__all__ = ["PREPROCESSING_NAME", "ImagePreprocessor", "TextPreprocessor"]

PREPROCESSING_NAME = "preprocessing.json"

# Triton's dynamic batcher joins requests of equal shape, so lengths are rounded up to steps.
_LENGTH_STEP = 8


class _Preprocessor(ABC):
    """A model of Triton's Python backend."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the files beside model.py; Triton calls this once per instance.

        Args:
            args: Of Triton: `model_repository` and `model_version` name the folder,
                `model_config` is the configuration as JSON.

        Raises:
            MmedgeError: If a file beside model.py is missing or cannot be used.
        """
        self._server = importlib.import_module("triton_python_backend_utils")
        folder = Path(args["model_repository"]) / args["model_version"]
        outputs = json.loads(args["model_config"])["output"]
        self._dtypes = {
            entry["name"]: np.dtype(self._server.triton_string_to_numpy(entry["data_type"]))
            for entry in outputs
        }
        document = (folder / PREPROCESSING_NAME).read_bytes()
        config: ProcessorConfig = TypeAdapter(ProcessorConfig).validate_json(document)
        self._open(config, folder)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Prepare the inputs of each request; invalid input is an error of that request only."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:  # noqa: ANN401, Triton ships no types
        try:
            tensors = self._prepare(request)
        except MmedgeError as error:
            return self._server.InferenceResponse(
                output_tensors=[], error=self._server.TritonError(str(error))
            )
        return self._server.InferenceResponse(
            output_tensors=[
                self._server.Tensor(name, np.ascontiguousarray(tensors[name], dtype))
                for name, dtype in self._dtypes.items()
            ]
        )

    def _given(self, request: Any, name: str) -> Array | None:  # noqa: ANN401
        tensor = self._server.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    @abstractmethod
    def _open(self, config: ProcessorConfig, folder: Path) -> None:
        """Open the processor."""

    @abstractmethod
    def _prepare(self, request: Any) -> Mapping[str, Array]:  # noqa: ANN401
        """Return the encoder's inputs by name."""


class ImagePreprocessor(_Preprocessor):
    """Images to the image encoder's input.

    A request gives `image`, (N, 1) bytes of image files, or `frame`, (N, H, W, 3) uint8.
    """

    def _open(self, config: ProcessorConfig, folder: Path) -> None:
        if not isinstance(config, ImageConfig):
            raise InputError(f"{folder}: no image preprocessing. Export the bundle again.")
        self._processor = ImageProcessor(config)

    def _prepare(self, request: Any) -> Mapping[str, Array]:  # noqa: ANN401
        files, frames = self._given(request, IMAGE), self._given(request, FRAME)
        if (files is None) == (frames is None):
            got = "neither" if files is None else "both"
            raise InputError(
                f"Got {got} of '{IMAGE}' and '{FRAME}', expected one: the bytes of image files, or "
                "uint8 frames (N, height, width, 3)."
            )
        images: list[ImageSource] = []
        if files is not None:
            images += [bytes(file) for file in files.reshape(-1)]
        if frames is not None:
            images += list(frames)
        return self._processor(images)


class TextPreprocessor(_Preprocessor):
    """Texts, (N, 1) UTF-8, to the text encoder's inputs."""

    def _open(self, config: ProcessorConfig, folder: Path) -> None:
        if not isinstance(config, TextConfig):
            raise InputError(f"{folder}: no text preprocessing. Export the bundle again.")
        self._processor = TextProcessor(config, folder / TOKENIZER_NAME)

    def _prepare(self, request: Any) -> Mapping[str, Array]:  # noqa: ANN401
        given = self._given(request, TEXT)
        if given is None:
            raise InputError(f"Got no '{TEXT}', expected UTF-8 texts (N, 1).")
        texts = [_decoded(text, position) for position, text in enumerate(given.reshape(-1))]
        feed = self._processor(texts)
        config = self._processor.config
        if config.padding == "longest":
            feed = _lengthened(feed, config.pad_id, config.input, config.max_length)
        return feed


def _decoded(text: bytes | str, position: int) -> str:
    if isinstance(text, str):
        return text
    try:
        return bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"Text {position}: not UTF-8 (byte {error.start}).") from error


def _lengthened(
    feed: Mapping[str, Array], pad_id: int, ids_name: str, max_length: int
) -> dict[str, Array]:
    """Pad ids and mask to the next length step, which does not change the outputs."""
    length = feed[ids_name].shape[1]
    wanted = min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, max_length)
    width = ((0, 0), (0, wanted - length))
    return {
        name: np.pad(array, width, constant_values=pad_id if name == ids_name else 0)
        for name, array in feed.items()
    }
