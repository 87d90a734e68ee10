"""load(): from a bundle to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import BundleError, InputError
from mmedge.models.dual_encoder import IMAGE_ENCODER, TEXT_ENCODER, DualEncoder
from mmedge.runtimes.backends import backend as module_of
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.choice import engine_backend, leading_backend, open_fastest
from mmedge.sessions.opening import graph_of, open_variant, session_options
from mmedge.sessions.warming import WarmingReport, open_meanwhile, warm_up

__all__ = ["load"]


def load(
    path: Path | str,
    *,
    device: str | None = None,
    precision: str | Mapping[str, str] | None = None,
    backend: str | None = None,
    roles: Sequence[str] | None = None,
    options: SessionOptions | None = None,
    warm: str | None = None,
    warming_report: WarmingReport | None = None,
) -> DualEncoder:
    """Load a bundle.

    Where several installed backends can run a role, the first load on a machine measures which is
    the fastest, a second or two for each role and in memory for all of them at once, and remembers
    it in the cache folder ($MMEDGE_CACHE_DIR, else ~/.cache/mmedge); later loads open that one
    alone. Naming the backend measures nothing. `DualEncoder.choices` says what runs and why.

    Args:
        path: The bundle's folder.
        device: "cpu", "cuda" or "cuda:N"; "gpu" is another word for "cuda". None takes the device
            of `options`, and without these the best that the backend has here; with no backend
            named, the first installed one.
        precision: A precision ("int8": the first variant that has it, which is the one of highest
            fidelity), the exact name of a variant ("int8-dynamic"), or one of these for each role,
            by role name. None, or a role that is not named, takes the variant of highest fidelity.
        backend: One of mmedge.runtimes.BACKENDS, for all roles; None takes the fastest for
            each. TensorRT takes part once its engine is built (`mmedge build`); named here, it
            builds one for as long as that takes.
        roles: What to load, such as ["image_encoder"] on a device that never sees a text; None
            loads all. What is not loaded costs neither time nor memory.
        options: Threads and memory settings.
        warm: A backend that answers at once, such as "onnxruntime", while TensorRT's engines are
            built in the background, which takes minutes the first time. Each engine is shown the
            golden inputs and takes over between two calls; one that answers otherwise is refused.
            `backend` then names whose engines (None: the TensorRT that is installed), and `device`
            is a GPU. What answers meanwhile runs on that GPU if it can, else on the CPU.
            `DualEncoder.warming` says how far it is. None waits for what is to run.
        warming_report: With `warm`: told of every step, from the background thread.

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
    if warm is not None:
        name = backend or engine_backend()
        gpu = device or ("cuda" if options is None else options.device)
        settled = session_options(name, gpu, options)
        return _load_warm(bundle, variants, name, warm, settled, warming_report)
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


def _load_warm(
    bundle: Bundle,
    variants: Mapping[str, Variant],
    name: str,
    warm: str,
    options: SessionOptions,
    report: WarmingReport | None,
) -> DualEncoder:
    """Load a model that answers in one backend while the engines of another are made."""
    for variant in variants.values():
        graph_of(bundle, variant, name, options.device)  # said now, not in the background
    device = "cuda" if options.device == "cuda:0" else options.device
    if device not in module_of(name).available_devices():
        # Opening says what is missing. Nobody asked for an answer on another device for good.
        open_variant(
            bundle, next(iter(variants.values())), backend_name=name, options=options
        ).close()
    with ExitStack() as stack:
        sessions = open_meanwhile(bundle, variants, warm, options)
        for session in sessions.values():
            stack.callback(session.close)
        warming = warm_up(bundle, variants, sessions, name, options, report)
        stack.callback(warming.stop)
        choices = {role: Choice(warm, f"answers until {name} is ready") for role in sessions}
        model = DualEncoder(bundle, sessions, variants, choices, warming)
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
