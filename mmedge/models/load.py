"""load(): from a bundle to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import BundleError, InputError
from mmedge.models.base import Model
from mmedge.models.registry import model_class
from mmedge.runtimes.backends import backend as module_of
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.choice import engine_backend, leading_backend, open_fastest
from mmedge.sessions.opening import graph_of, open_variant, session_options
from mmedge.sessions.verification import open_in_time
from mmedge.sessions.warming import WarmingReport, open_meanwhile, warm_up

__all__ = ["load", "load_as"]

ModelT = TypeVar("ModelT", bound=Model)


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
) -> Model:
    """Load a bundle as the model of its kind; see mmedge.models.registry.

    Where several installed backends can run a role, the first load on a machine measures which is
    the fastest, a second or two for each role and in memory for all of them at once, and remembers
    it in the cache folder ($MMEDGE_CACHE_DIR, else ~/.cache/mmedge); later loads open that one
    alone. Naming the backend measures nothing. `Model.choices` says what runs and why.

    Args:
        path: The bundle's folder.
        device: "cpu", "cuda" or "cuda:N"; "gpu" is another word for "cuda". None takes the device
            of `options`, and without these the best that the backend has here; with no backend
            named, the first installed one.
        precision: A precision ("int8": the first variant that has it, which is the one of highest
            fidelity), the exact name of a variant ("int8-dynamic"), or one of these for each role,
            by role name. None, or a role that is not named, takes the bundle's default.
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
            `Model.warming` says how far it is. None waits for what is to run.
        warming_report: With `warm`: told of every step, from the background thread.

    Returns:
        The model. Close it, or use it in a `with` block, to free its memory.

    Raises:
        BundleError: If the bundle cannot be opened or trusted, or is of a kind unknown here.
        InputError: If it holds no such role or variant; those it holds are listed.
        BackendError: If the backend or the device is missing, or would not run the graph there.
    """
    return load_as(
        Model,
        path,
        device=device,
        precision=precision,
        backend=backend,
        roles=roles,
        options=options,
        warm=warm,
        warming_report=warming_report,
    )


def load_as(  # noqa: PLR0913, what load takes
    wanted: type[ModelT],
    path: Path | str,
    *,
    device: str | None = None,
    precision: str | Mapping[str, str] | None = None,
    backend: str | None = None,
    roles: Sequence[str] | None = None,
    options: SessionOptions | None = None,
    warm: str | None = None,
    warming_report: WarmingReport | None = None,
) -> ModelT:
    """Load a bundle of a known kind; see load.

    Raises:
        BundleError: If the bundle is of another kind, and as for load.
    """
    bundle = open_bundle(path)
    found = model_class(bundle.manifest.kind.type)
    if not issubclass(found, wanted):
        raise BundleError(
            f"{bundle.path} is a {found.__name__} bundle, not a {wanted.__name__}. Load it with "
            "mmedge.load."
        )
    names = _wanted_roles(bundle, roles)
    by_role = _precision_by_role(bundle, names, precision)
    variants = {role: bundle.variant(role, by_role.get(role)) for role in names}
    if warm is not None:
        name = backend or engine_backend()
        gpu = device or ("cuda" if options is None else options.device)
        settled = session_options(name, gpu, options)
        return _load_warm(found, bundle, variants, name, warm, settled, warming_report)
    settled = session_options(backend or leading_backend(), device, options)
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        choices: dict[str, Choice] = {}
        for role, variant in variants.items():
            if backend is None:
                session, choices[role] = open_fastest(bundle, role, variant, settled)
            else:
                session = open_in_time(bundle, role, variant, backend, settled)
                choices[role] = Choice(backend, "asked for")
            sessions[role] = session
            stack.callback(session.close)
        model = found(bundle, sessions, variants, choices)
        stack.pop_all()
    return model


def _load_warm(
    made: type[ModelT],
    bundle: Bundle,
    variants: Mapping[str, Variant],
    name: str,
    warm: str,
    options: SessionOptions,
    report: WarmingReport | None,
) -> ModelT:
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
        model = made(bundle, sessions, variants, choices, warming)
        stack.pop_all()
    return model


def _wanted_roles(bundle: Bundle, roles: Sequence[str] | None) -> tuple[str, ...]:
    known = tuple(bundle.manifest.roles)
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
