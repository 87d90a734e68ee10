"""Replaying the golden vectors: are the answers here the answers there?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Tolerance, Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import InputError
from mmedge.runtimes.session import Placement, Session, SessionOptions
from mmedge.sessions.opening import DEFAULT_BACKEND, open_variant, session_options, takes
from mmedge.specs import Array

__all__ = ["RoleVerification", "replay", "verify_bundle"]


@dataclass(frozen=True, slots=True)
class RoleVerification:
    """How far one variant of one role lies here from its golden answers.

    Attributes:
        role: Role name.
        variant: Variant name.
        placement: What ran where.
        samples: Number of golden inputs.
        cosine_min: Lowest cosine of an answer with its golden answer; NaN where one is not finite.
        max_abs_error: Largest difference of a value; NaN where one is not finite.
        tolerance: What the manifest allows.
        passed: Whether both figures are within tolerance.
    """

    role: str
    variant: str
    placement: Placement
    samples: int
    cosine_min: float
    max_abs_error: float
    tolerance: Tolerance
    passed: bool


def verify_bundle(
    bundle: Bundle,
    *,
    device: str | None = None,
    precision: str | None = None,
    backend: str | None = None,
    options: SessionOptions | None = None,
) -> list[RoleVerification]:
    """Replay the golden vectors of every role and variant, one session at a time.

    The hashes of the files are another matter: see mmedge.bundle.verify_files.

    Args:
        bundle: An opened bundle.
        device: As for mmedge.load.
        precision: A precision or the exact name of a variant; None replays all that the backend
            has a layout for.
        backend: One of mmedge.runtimes.session.BACKENDS; None is ONNX Runtime, which computed the
            golden answers.
        options: Threads and memory settings.

    Returns:
        One entry for each role and variant, in the order of the manifest.

    Raises:
        IntegrityError: If the golden vectors are missing or damaged.
        InputError: If no role has a variant of that precision, or none that the backend takes.
        BackendError: If a graph cannot be opened or run.
    """
    backend_name = backend or DEFAULT_BACKEND
    settled = session_options(backend_name, device, options)
    chosen = [
        (role, variant)
        for role, entry in bundle.manifest.roles.items()
        for variant in entry.variants
        if precision in (None, variant.name, variant.precision.value)
    ]
    if not chosen:
        raise InputError(bundle.no_variant(str(precision), tuple(bundle.manifest.roles)))
    taken = [each for each in chosen if takes(each[1], backend_name, settled.device)]
    golden = bundle.golden()
    results = []
    for role, variant in taken or chosen:  # where none is taken, the first says why
        with open_variant(bundle, variant, backend_name=backend_name, options=settled) as session:
            results.append(replay(session, golden, role, variant))
    return results


def replay(session: Session, golden: Golden, role: str, variant: Variant) -> RoleVerification:
    """Run the golden inputs of a role and compare the answers with the golden ones.

    Args:
        session: The variant, opened.
        golden: The bundle's golden vectors.
        role: Role name.
        variant: What the session runs.

    Raises:
        BackendError: If the engine fails.
    """
    feed = golden.inputs[role]
    answers = session.run(feed)
    cosine_min, max_abs_error = _compare(answers, golden.outputs[role][variant.name])
    tolerance = variant.tolerance
    return RoleVerification(
        role=role,
        variant=variant.name,
        placement=session.placement,
        samples=len(next(iter(feed.values()))),
        cosine_min=cosine_min,
        max_abs_error=max_abs_error,
        tolerance=tolerance,
        # NaN compares false, so an answer that is not finite never passes.
        passed=cosine_min >= tolerance.cosine_min and max_abs_error <= tolerance.max_abs_error,
    )


def _compare(answers: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[float, float]:
    """Return the lowest cosine and the largest difference over all outputs and samples."""
    cosines, errors = [], []
    for name, golden in expected.items():
        answer = answers.get(name)
        if answer is None or answer.shape != golden.shape:
            return float("nan"), float("nan")
        a = answer.astype(np.float64).reshape(len(golden), -1)
        b = golden.astype(np.float64).reshape(len(golden), -1)
        with np.errstate(all="ignore"):  # what is not finite is to become NaN, not a warning
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            equal = (a == b).all(axis=1)  # two zero vectors agree, though they have no cosine
            cosine = np.clip((a * b).sum(axis=1) / norms, -1, 1)
            cosines.append(np.where(equal, 1.0, cosine))
            errors.append(np.abs(a - b))
    return (
        float(np.min(np.concatenate(cosines))),
        float(np.max([error.max(initial=0) for error in errors])),
    )
