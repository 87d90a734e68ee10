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
        reference: The source's model; takes inputs by keyword, gives embeddings (N, D), or a tuple
            of what the module gives.

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
    cosine = 1.0
    for output, wanted in zip(_outputs(got), _outputs(expected), strict=False):
        if output.shape != wanted.shape:
            raise ParityError(
                f"{role}: gives {output.shape}, the source's own model {wanted.shape}."
            )
        cosine = min(cosine, float(cosines(wanted, output).min()))
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


def _outputs(output: Any) -> list[Any]:  # noqa: ANN401, transformers is untyped
    """Return the rows of a tuple's tensors, or of the embedding that transformers gives."""
    if isinstance(output, tuple):
        return [each.float().flatten(1).numpy() for each in output]
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        output = getattr(output, name, output)
    return [output.float().flatten(1).numpy()]
