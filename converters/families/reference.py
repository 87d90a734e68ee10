"""Whether a role, fed as on the device, gives what the source's own model gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmedge.bundle.differences import cosines
from mmedge.converters.sources.config import foreign_errors
from mmedge.errors import ParityError

__all__ = ["check_reference"]

_COSINE_MIN = 0.9999


def check_reference(
    role: str,
    module: nn.Module,
    fed: Mapping[str, torch.Tensor],
    reference: Callable[..., Any],
    given: Mapping[str, torch.Tensor],
) -> None:
    """Compare a role's module, on the device's inputs, with the source's model on its own inputs.

    A source's processor may give inputs that the role does not take, such as an attention mask.
    The comparison shows that they have no effect.

    Args:
        role: The role's name, for messages.
        module: The role's; takes `fed` in order, returns one tensor (N, D) or several.
        fed: What the device's processor gives for some samples, by input name.
        reference: The source's model: by keyword, an output (N, D) or one with `pooler_output`.
        given: What the source's processor gives for the same samples, by name.

    Raises:
        ParityError: If they differ; the inputs that the role does not take are named.
        SourceError: If the source's model refuses its own processor's inputs.
    """
    taken = inspect.signature(reference).parameters
    with torch.inference_mode():
        got = module.eval()(*fed.values())
        with foreign_errors(f"{role}: the model refuses its own processor's inputs", "Mend it."):
            expected = reference(**{name: given[name] for name in given if name in taken})
    rows = [_rows(got), _rows(expected)]
    if rows[0].shape != rows[1].shape:
        raise ParityError(f"{role}: gives {rows[0].shape}, the source's own model {rows[1].shape}.")
    cosine = float(cosines(rows[1], rows[0]).min())
    if not cosine >= _COSINE_MIN:
        left_out = [name for name in given if name in taken and name not in fed]
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
    first: Any = output[0] if isinstance(output, Sequence) else output
    rows: Any = getattr(first, "pooler_output", first)
    return rows.float().flatten(1).numpy()
