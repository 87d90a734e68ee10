"""Check of a role's outputs against the source's own model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mmedge.bundle.differences import cosines
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.sources.config import foreign_errors
from mmedge.converters.sources.reference_processors import reference_inputs
from mmedge.converters.sources.source import Source
from mmedge.errors import ParityError
from mmedge.preprocess.registry import Processor

__all__ = ["check_reference"]

_COSINE_MIN = 0.9999


def check_reference(
    source: Source,
    role: str,
    spec: RoleSpec,
    processors: Mapping[str, Processor],
    reference: Callable[..., Any],
) -> None:
    """Compare a role's module, on the device's inputs, with the source's model on its own inputs.

    A source's processor may give inputs that the role does not take, such as an attention mask.
    The comparison shows that they have no effect.

    Args:
        source: The original.
        role: The role's name, for messages.
        spec: The role, with a module, fed by one processor.
        processors: Of the device, by name.
        reference: The source's model; takes inputs by keyword, gives embeddings (N, D).

    Raises:
        ParityError: If they differ; the inputs that the role does not take are named.
        SourceError: If the source's model rejects its own processor's inputs.
    """
    (processor,) = (processors[name] for name in spec.processors)
    samples, given = reference_inputs(source, processor.config)
    if spec.module is None or not samples:
        return
    fed = processor(samples)
    taken = inspect.signature(reference).parameters
    with torch.inference_mode():
        with foreign_errors(f"{role}: the model rejects its own processor's inputs", "Correct it."):
            expected = reference(**{name: given[name] for name in given if name in taken})
        got = spec.module.eval()(*(torch.from_numpy(fed[item.name]) for item in spec.inputs))
    rows = [_rows(got), _rows(expected)]
    if rows[0].shape != rows[1].shape:
        raise ParityError(f"{role}: gives {rows[0].shape}, the source's own model {rows[1].shape}.")
    cosine = float(cosines(rows[1], rows[0]).min())
    if not cosine >= _COSINE_MIN:
        fed_names = {item.name for item in spec.inputs}
        left_out = [name for name in given if name in taken and name not in fed_names]
        why = (
            f"the graph does not take {', '.join(left_out)}, which the source's processor gives"
            if left_out
            else "the inputs differ"
        )
        raise ParityError(
            f"{role}: differs from the source's own model (smallest cosine {cosine:.4f}, expected "
            f"at least {_COSINE_MIN}): {why}. Please report the model."
        )


def _rows(output: Any) -> Any:  # noqa: ANN401, transformers is untyped
    first = output[0] if isinstance(output, tuple) else output
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        first = getattr(first, name, first)
    return first.float().flatten(1).numpy()
