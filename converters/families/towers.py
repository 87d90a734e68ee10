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

from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.families.loading import DUAL_ENCODER_TASK
from mmedge.specs import Axis, Compare, TensorSpec

__all__ = ["IMAGE_BATCH", "TEXT_BATCH", "embedding_role", "image_role", "seeded", "text_role"]

# Past these sizes a batch gains next to nothing on a CPU, and memory grows with it.
IMAGE_BATCH = Axis(1, 1, 8)
TEXT_BATCH = Axis(1, 1, 32)
_USUAL_TOKENS = 16  # of a caption or a label


def embedding_role(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    dim: int,
    *,
    processor: str,
    axes: Mapping[str, Axis],
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]],
    trace_sizes: Mapping[str, int],
    proof_sizes: tuple[Mapping[str, int], ...],
) -> RoleSpec:
    """Describe an encoder with one output `embedding` (batch, dim) float32, L2-normalised.

    Args:
        module: Takes the inputs, returns the embedding.
        inputs: Its inputs, all from one processor.
        dim: D of the embedding.
        processor: Name of the processor.
        axes: See RoleSpec, like the others.
        sample: See RoleSpec.
        trace_sizes: See RoleSpec.
        proof_sizes: See RoleSpec.
    """
    return RoleSpec(
        module=module,
        inputs=inputs,
        outputs=(TensorSpec("embedding", np.dtype(np.float32), ("batch", dim)),),
        axes=axes,
        sample=sample,
        trace_sizes=trace_sizes,
        proof_sizes=proof_sizes,
        feeds={item.name: ProcessorFeed(processor=processor) for item in inputs},
        compare={"embedding": Compare.ROWS},
    )


def image_role(module: nn.Module, config: Any, dim: int) -> RoleSpec:  # noqa: ANN401
    """Describe an image tower of fixed resolution.

    Args:
        module: pixel_values (B, 3, H, W) float32 -> embedding (B, dim) float32.
        config: The model's configuration (transformers is untyped), with a `vision_config`.
        dim: D of the embedding.
    """
    normalized = _normalized(config)
    side = int(normalized.image_size)
    shape = ("batch", int(normalized.num_channels), side, side)

    def sample(sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        generator = DummyVisionInputGenerator(
            DUAL_ENCODER_TASK, normalized, batch_size=sizes["batch"]
        )
        with seeded(seed):
            # From [0, 1) to about the range that normalised pixels have.
            return {"pixel_values": generator.generate("pixel_values") * 4 - 2}

    return embedding_role(
        module,
        (TensorSpec("pixel_values", np.dtype(np.float32), shape),),
        dim,
        processor="image",
        axes={"batch": IMAGE_BATCH},
        sample=sample,
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
    )


def text_role(
    module: nn.Module,
    config: Any,  # noqa: ANN401
    dim: int,
    *,
    dynamic_sequence: bool,
    close: Callable[[torch.Tensor], None] | None = None,
) -> RoleSpec:
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
        with seeded(seed):
            ids = cast(torch.Tensor, generator.generate("input_ids"))
        if close is not None:
            close(ids)
        return {"input_ids": ids}

    axes = {"batch": TEXT_BATCH}
    sequences: list[dict[str, int]] = [{}]
    traced: dict[str, int] = {}
    if dynamic_sequence:
        axes["sequence"] = Axis(1, min(_USUAL_TOKENS, longest), longest)
        sequences = [{"sequence": n} for n in sorted({2, (longest + 1) // 2, longest})]
        traced = {"sequence": max(2, longest // 2)}
    shape = ("batch", "sequence" if dynamic_sequence else longest)
    return embedding_role(
        module,
        (TensorSpec("input_ids", np.dtype(np.int64), shape),),
        dim,
        processor="text",
        axes=axes,
        sample=sample,
        trace_sizes={"batch": 2, **traced},
        proof_sizes=tuple(
            {"batch": batch, **sequence} for batch in (1, 3) for sequence in sequences
        ),
    )


def _normalized(config: Any) -> Any:  # noqa: ANN401, optimum and transformers are untyped
    return NormalizedTextAndVisionConfig.with_args(
        text_config="text_config", vision_config="vision_config"
    )(config)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, which optimum's generators draw from, and leave its state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
