"""What the towers of dual encoders have in common: specs, and inputs to prove them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator
from optimum.utils.normalized_config import NormalizedTextAndVisionConfig
from torch import nn

from mmedge.converters.families.base import ExportSpec
from mmedge.converters.families.loading import DUAL_ENCODER_TASK
from mmedge.specs import Compare, Modality, TensorSpec

__all__ = ["image_spec", "text_spec"]


def image_spec(module: nn.Module, config: Any, dim: int) -> ExportSpec:  # noqa: ANN401
    """Describe an image tower of fixed resolution.

    Args:
        module: pixel_values (B, 3, H, W) float32 -> embedding (B, dim) float32.
        config: The model's configuration (transformers is untyped), with a `vision_config`.
        dim: D of the embedding.
    """
    normalized = _normalized(config)
    side = int(normalized.image_size)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = DummyVisionInputGenerator(
            DUAL_ENCODER_TASK, normalized, batch_size=sizes["batch"]
        )
        with _seeded(seed):
            # From [0, 1) to about the range that normalised pixels have.
            return {"pixel_values": generator.generate("pixel_values") * 4 - 2}

    return ExportSpec(
        modality=Modality.IMAGE,
        module=module,
        inputs=(
            TensorSpec(
                "pixel_values",
                np.dtype(np.float32),
                ("batch", int(normalized.num_channels), side, side),
            ),
        ),
        outputs=(TensorSpec("embedding", np.dtype(np.float32), ("batch", dim)),),
        sample=sample,
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
        limits={},
        compare={"embedding": Compare.ROWS},
    )


def text_spec(
    module: nn.Module,
    config: Any,  # noqa: ANN401
    dim: int,
    *,
    dynamic_sequence: bool,
    close: Callable[[torch.Tensor], None] | None = None,
) -> ExportSpec:
    """Describe a text tower.

    Args:
        module: input_ids (B, T) int64 -> embedding (B, dim) float32.
        config: The model's configuration (transformers is untyped), with a `text_config`.
        dim: D of the embedding.
        dynamic_sequence: T is a dynamic axis; otherwise it is always the longest.
        close: Writes the closing token into sampled ids (B, T), in place.
    """
    normalized = _normalized(config)
    longest = int(config.text_config.max_position_embeddings)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = DummyTextInputGenerator(
            DUAL_ENCODER_TASK,
            normalized,
            batch_size=sizes["batch"],
            sequence_length=sizes.get("sequence", longest),
        )
        with _seeded(seed):
            ids = cast(torch.Tensor, generator.generate("input_ids"))
        if close is not None:
            close(ids)
        return {"input_ids": ids}

    lengths = sorted({2, (longest + 1) // 2, longest})
    sequences = [{"sequence": length} for length in lengths] if dynamic_sequence else [{}]
    traced = {"sequence": max(2, longest // 2)} if dynamic_sequence else {}
    return ExportSpec(
        modality=Modality.TEXT,
        module=module,
        inputs=(
            TensorSpec(
                "input_ids",
                np.dtype(np.int64),
                ("batch", "sequence" if dynamic_sequence else longest),
            ),
        ),
        outputs=(TensorSpec("embedding", np.dtype(np.float32), ("batch", dim)),),
        sample=sample,
        trace_sizes={"batch": 2, **traced},
        proof_sizes=tuple(
            {"batch": batch, **sequence} for batch in (1, 3) for sequence in sequences
        ),
        limits={"sequence": longest} if dynamic_sequence else {},
        compare={"embedding": Compare.ROWS},
    )


def _normalized(config: Any) -> Any:  # noqa: ANN401, optimum and transformers are untyped
    return NormalizedTextAndVisionConfig.with_args(
        text_config="text_config", vision_config="vision_config"
    )(config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, which optimum's generators draw from, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
