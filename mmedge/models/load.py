"""load(): open a bundle as a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import BundleError, InputError
from mmedge.models.base import Model
from mmedge.models.registry import model_class
from mmedge.preprocess.decode import MAX_PIXELS, Channels, ImageOptions
from mmedge.preprocess.steps import Alpha
from mmedge.runtimes.backends import backend as module_of
from mmedge.runtimes.selection.limits import may_measure
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.choice import engine_backend, leading_backend, open_fastest
from mmedge.sessions.opening import graph_of, open_variant, session_options
from mmedge.sessions.verification import open_in_time
from mmedge.sessions.warming import WarmingReport, open_meanwhile, warm_up

__all__ = ["load", "load_as"]

ModelT = TypeVar("ModelT", bound=Model)

load = Model.load
"""Load a bundle as the model of its kind; see mmedge.models.registry."""


def load_as(  # noqa: PLR0913, what load takes
    wanted: type[ModelT],
    path: Path | str,
    *,
    device: str | None = None,
    precision: str | Mapping[str, str] | None = None,
    backend: str | None = None,
    roles: Sequence[str] | None = None,
    options: SessionOptions | None = None,
    measure: bool | None = None,
    warm: str | None = None,
    warming_report: WarmingReport | None = None,
    channels: Channels = "rgb",
    alpha: Alpha | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ModelT:
    """Load a bundle of a known kind; see Model.load.

    Raises:
        BundleError: If the bundle is of another kind, and as for Model.load.
    """
    images = ImageOptions(channels, alpha, max_pixels)
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
    reopen = partial(
        load_as,
        wanted,
        bundle.path.resolve(),
        device=device,
        precision=precision,
        backend=backend,
        roles=roles,
        options=options,
        measure=measure,
        warm=warm,
        channels=channels,
        alpha=alpha,
        max_pixels=max_pixels,
    )
    if warm is not None:
        name = backend or engine_backend()
        gpu = device or ("cuda" if options is None else options.device)
        settled = session_options(name, gpu, options)
        model = _load_warm(found, bundle, variants, name, warm, settled, warming_report)
        model.opened(images, reopen)
        return model
    settled = session_options(backend or leading_backend(), device, options)
    measured = backend is None and may_measure(measure)
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        choices: dict[str, Choice] = {}
        for role, variant in variants.items():
            if backend is None:
                session, choices[role] = open_fastest(
                    bundle, role, variant, settled, measure=measured
                )
            else:
                session = open_in_time(bundle, role, variant, backend, settled)
                choices[role] = Choice(backend, "requested")
            sessions[role] = session
            stack.callback(session.close)
        model = found(bundle, sessions, variants, choices)
        stack.pop_all()
    model.opened(images, reopen)
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
    """Load a model in one backend while the engines of another are built in the background."""
    for variant in variants.values():
        graph_of(bundle, variant, name, options.device)  # raised now, not in the background
    device = "cuda" if options.device == "cuda:0" else options.device
    if device not in module_of(name).available_devices():
        # Opening raises the error: another device was not requested permanently.
        open_variant(
            bundle, next(iter(variants.values())), backend_name=name, options=options
        ).close()
    with ExitStack() as stack:
        sessions = open_meanwhile(bundle, variants, warm, options)
        for session in sessions.values():
            stack.callback(session.close)
        warming = warm_up(bundle, variants, sessions, name, options, report)
        stack.callback(warming.stop)
        choices = {role: Choice(warm, f"serves until {name} is ready") for role in sessions}
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
