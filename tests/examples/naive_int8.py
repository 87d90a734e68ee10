"""The plainest static int8 that ONNX Runtime offers, to see what it does to a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

Embeddings = npt.NDArray[np.float32]
Feed = dict[str, npt.NDArray[Any]]


class _ImageTower(torch.nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled), dim=-1)


class _TextTower(torch.nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pooled = self.model.text_model(input_ids=input_ids).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled), dim=-1)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


class NaiveInt8:
    """Both towers exported, quantized with min-max, unsigned activations, one scale a tensor."""

    def __init__(
        self, folder: Path, work: Path, images: Sequence[Image.Image], texts: Sequence[str]
    ) -> None:
        """Export and quantize into ``work`` with these calibration images and texts."""
        work.mkdir(parents=True, exist_ok=True)
        model = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
        self._tokenizer = CLIPTokenizerFast.from_pretrained(folder)
        self._processor = CLIPImageProcessorPil.from_pretrained(folder)
        self._image = self._quantized(_ImageTower(model), self._pixels(images), work / "image")
        self._text = self._quantized(_TextTower(model), self._tokens(texts), work / "text")

    def images(self, images: Sequence[Image.Image]) -> Embeddings:
        """(N, D) float32, L2-normalised."""
        return self._run(self._image, self._pixels(images))

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """(N, D) float32, L2-normalised."""
        return self._run(self._text, self._tokens(texts))

    def _pixels(self, images: Sequence[Image.Image]) -> Feed:
        return {"pixel_values": self._processor(list(images), return_tensors="np").pixel_values}

    def _tokens(self, texts: Sequence[str]) -> Feed:
        rows = self._tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="np"
        )
        return {"input_ids": rows["input_ids"].astype(np.int64)}

    @staticmethod
    def _run(session: ort.InferenceSession, feed: Feed) -> Embeddings:
        ((name, rows),) = feed.items()
        parts = [session.run(None, {name: rows[i : i + 64]})[0] for i in range(0, len(rows), 64)]
        return np.concatenate(parts).astype(np.float32)

    @staticmethod
    def _quantized(tower: torch.nn.Module, feed: Feed, stem: Path) -> ort.InferenceSession:
        ((name, rows),) = feed.items()
        plain, small = stem.with_suffix(".onnx"), stem.with_suffix(".int8.onnx")
        program = torch.onnx.export(
            tower.eval(),
            (torch.from_numpy(rows[:2]),),
            dynamo=True,
            opset_version=20,
            input_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(plain)
        quantize_static(
            plain,
            small,
            _Reader([{name: rows[i : i + 16]} for i in range(0, len(rows), 16)]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # Not the additions: the causal mask's -3e38 would ruin any model's text tower.
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )
        return ort.InferenceSession(small, providers=["CPUExecutionProvider"])
