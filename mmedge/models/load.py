"""load(): from a bundle to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import BundleError, InputError
from mmedge.models.choice import leading_backend, open_fastest
from mmedge.models.dual_encoder import IMAGE_ENCODER, TEXT_ENCODER, DualEncoder
from mmedge.models.opening import open_variant, session_options
from mmedge.runtimes.choices import Choice
from mmedge.runtimes.session import Session, SessionOptions

__all__ = ["load"]


def load(
    path: Path | str,
    *,
    device: str | None = None,
    precision: str | Mapping[str, str] | None = None,
    backend: str | None = None,
    roles: Sequence[str] | None = None,
    options: SessionOptions | None = None,
) -> DualEncoder:
    """Load a bundle.

    Where several installed backends can run a role, the first load on a machine measures which is
    the fastest, a second or two for each role and in memory for all of them at once, and remembers
    it in the cache folder ($MMEDGE_CACHE_DIR, else ~/.cache/mmedge); later loads open that one
    alone. Naming the backend measures nothing. `DualEncoder.choices` says what runs and why.

    Args:
        path: The bundle's folder.
        device: "cpu", "cuda" or "cuda:N". None takes the device of `options`, and without these
            the best that the backend has here; with no backend named, the first installed one.
        precision: A precision ("int8": the first variant that has it, which is the one of highest
            fidelity), the exact name of a variant ("int8-dynamic"), or one of these for each role,
            by role name. None, or a role that is not named, takes the variant of highest fidelity.
        backend: One of mmedge.runtimes.session.BACKENDS, for all roles; None takes the fastest for
            each.
        roles: What to load, such as ["image_encoder"] on a device that never sees a text; None
            loads all. What is not loaded costs neither time nor memory.
        options: Threads and memory settings.

    Returns:
        The model. Close it, or use it in a `with` block, to free its memory.

    Raises:
        BundleError: If the bundle cannot be opened or trusted, or is of a kind unknown here.
        InputError: If it holds no such role or variant; those it holds are listed.
        BackendError: If the backend or the device is missing, or would not run the graph there.
    """
    bundle = open_bundle(path)
    wanted = _wanted_roles(bundle, roles)
    by_role = _precision_by_role(bundle, wanted, precision)
    variants = {role: bundle.variant(role, by_role.get(role)) for role in wanted}
    settled = session_options(backend or leading_backend(), device, options)
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        choices: dict[str, Choice] = {}
        for role, variant in variants.items():
            if backend is None:
                session, choices[role] = open_fastest(bundle, role, variant, settled)
            else:
                session = open_variant(bundle, variant, backend_name=backend, options=settled)
                choices[role] = Choice(backend, "asked for")
            sessions[role] = session
            stack.callback(session.close)
        model = DualEncoder(bundle, sessions, variants, choices)
        stack.pop_all()
    return model


def _wanted_roles(bundle: Bundle, roles: Sequence[str] | None) -> tuple[str, ...]:
    held = bundle.manifest.roles
    known = tuple(role for role in (IMAGE_ENCODER, TEXT_ENCODER) if role in held)
    if not known:
        raise BundleError(
            f"{bundle.path}: a bundle of family '{bundle.manifest.family}' with roles "
            f"{list(held)}; this version loads those with {IMAGE_ENCODER} or "
            f"{TEXT_ENCODER}. Update mmedge."
        )
    if roles is None:
        return known
    if isinstance(roles, str):
        raise InputError(f"roles: got '{roles}', expected a sequence. Pass ['{roles}'].")
    unknown = [role for role in roles if role not in known]
    if unknown or not roles:
        raise InputError(f"roles: got {list(roles)}, expected one or more of {list(known)}.")
    return tuple(role for role in known if role in roles)


def _precision_by_role(
    bundle: Bundle, wanted: Sequence[str], precision: str | Mapping[str, str] | None
) -> Mapping[str, str]:
    if precision is None:
        return {}
    if isinstance(precision, str):
        return dict.fromkeys(wanted, precision)
    unknown = [role for role in precision if role not in wanted]
    if unknown:
        raise InputError(
            f"precision: names the roles {unknown}, expected some of {list(wanted)}, which are "
            f"what is loaded from {bundle.path}."
        )
    return precision
