"""Loading a bundle to embed as many items a second as the machine can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mmedge.bundle import open_bundle
from mmedge.bundle.kinds import EmbeddingKind
from mmedge.errors import BundleError
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.runtimes.backends import backend as module_of
from mmedge.runtimes.processor import allowed_processors
from mmedge.sessions.choice import leading_backend
from mmedge.sessions.opening import session_options
from mmedge.specs import Modality

__all__ = ["BulkModel", "load_bulk_model"]

_ON_A_GPU = 2  # one batch is copied while the other is computed


@dataclass(frozen=True, slots=True, eq=False)
class BulkModel:
    """A model loaded to embed many images and sounds.

    Attributes:
        model: Without its text encoder, if it has others.
        encoders: Batches to encode at once.
    """

    model: EmbeddingModel
    encoders: int


def load_bulk_model(
    bundle: Path | str, precision: str | None, backend: str | None, *, cpus: int | None = None
) -> BulkModel:
    """Load a bundle to embed many items.

    On a CPU each batch gets a thread of its own, so that no CPU waits for another at the end of an
    operator or spins meanwhile, which would take it from the threads that decode. A backend whose
    runs wait for one another gets all CPUs for one batch at a time.

    Args:
        bundle: The bundle's folder.
        precision: As for mmedge.load.
        backend: As for mmedge.load.
        cpus: CPUs to use; None for those that this process may use.

    Raises:
        BundleError: If it is of a kind that does not embed, or cannot be opened.
        BackendError: If the engine fails.
    """
    kind = open_bundle(bundle).manifest.kind
    if not isinstance(kind, EmbeddingKind):
        raise BundleError(
            f"{bundle} is a {kind.type} bundle, expected a dual_encoder or an encoder."
        )
    roles = [role for modality, role in kind.encoders.items() if modality is not Modality.TEXT]
    load = partial(
        load_as, EmbeddingModel, bundle, precision=precision, backend=backend, roles=roles or None
    )
    options = replace(session_options(backend or leading_backend(), None, None), spin=False)
    if options.device != "cpu":
        return BulkModel(load(options=options), _ON_A_GPU)
    count = cpus or len(allowed_processors())
    model = load(options=replace(options, threads=1))
    backends = {session.placement.backend for session in model.sessions.values()}
    if count == 1 or all(module_of(name).parallel_runs for name in backends):
        return BulkModel(model, count)
    model.close()
    return BulkModel(load(options=replace(options, threads=count)), 1)
