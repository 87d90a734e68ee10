"""Golden vector replay: comparison of outputs here with those at conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.bundle.differences import difference
from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.bundle.quality import Tolerance
from mmedge.errors import InputError
from mmedge.runtimes.backends import DEFAULT_BACKEND
from mmedge.runtimes.backends import backend as module_of
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.selection.limits import time_limit
from mmedge.runtimes.selection.preparing import prepare_apart
from mmedge.runtimes.selection.worker import (
    Report,
    options_from_json,
    options_to_json,
    run_apart,
    serve,
)
from mmedge.runtimes.session import Placement, Session, SessionOptions
from mmedge.runtimes.steps import run_steps
from mmedge.sessions.checks import check_processing
from mmedge.sessions.opening import (
    graph_of,
    open_variant,
    session_options,
    takes,
    with_axes,
)
from mmedge.specs import Array, Compare, State

__all__ = ["RoleVerification", "open_in_time", "replay", "replay_variants", "verify_bundle"]


@dataclass(frozen=True, slots=True)
class RoleVerification:
    """Difference of one variant's outputs here from its golden outputs.

    Attributes:
        role: Role name.
        variant: Variant name.
        placement: What ran where.
        samples: Number of golden inputs.
        cosine_min: Lowest cosine of an output with its golden output; NaN if one is not finite.
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
    time_limit_s: float | None = None,
) -> list[RoleVerification]:
    """Replay the golden vectors of every role and variant, one session at a time.

    An example goes through the processors and the graph of each role too, and so do the largest
    token ids.

    The graphs run in a process of their own, which is ended where one takes too long. Engines that
    have to be built first are built without a limit. The hashes of the files are another matter:
    see mmedge.bundle.verify_files.

    Args:
        bundle: An opened bundle.
        device: As for mmedge.load.
        precision: A precision or the exact name of a variant; None replays all that the backend
            has a layout for.
        backend: One of mmedge.runtimes.BACKENDS; None is ONNX Runtime, which computed the
            golden outputs.
        options: Threads and memory settings.
        time_limit_s: Seconds for each variant; see mmedge.runtimes.selection.limits.time_limit.

    Returns:
        One entry for each role and variant, in the order of the manifest.

    Raises:
        IntegrityError: If the golden vectors are missing or damaged.
        InputError: If no role has a variant of that precision, or none that the backend takes.
        BackendError: If a graph cannot be opened or run.
        TimeLimitError: If a graph takes too long.
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
    wanted = taken or chosen  # if none fits, the first raises the reason
    return replay_variants(bundle, wanted, backend_name, settled, time_limit(time_limit_s))


def replay_variants(
    bundle: Bundle,
    variants: Sequence[tuple[str, Variant]],
    backend_name: str,
    options: SessionOptions,
    limit_s: float | None,
) -> list[RoleVerification]:
    """Replay the golden vectors of some variants, by role name and variant.

    Args:
        bundle: An opened bundle.
        variants: What to replay.
        backend_name: What runs them.
        options: How, the device settled.
        limit_s: Seconds for each, in a worker; None for no limit, in this process.

    Raises:
        IntegrityError, InputError, BackendError, TimeLimitError: As for verify_bundle.
    """
    if limit_s is not None:
        return _replay_apart(bundle, variants, backend_name, options, limit_s)
    golden = bundle.golden()
    return [_replay(bundle, golden, *each, backend_name, options) for each in variants]


def _replay(
    bundle: Bundle,
    golden: Golden,
    role: str,
    variant: Variant,
    backend_name: str,
    options: SessionOptions,
) -> RoleVerification:
    with open_variant(bundle, variant, backend_name=backend_name, options=options) as session:
        result = replay(session, golden, role, variant, bundle.state_of(role))
        check_processing(bundle, role, session)
        return result


def _replay_apart(
    bundle: Bundle,
    variants: Sequence[tuple[str, Variant]],
    backend_name: str,
    options: SessionOptions,
    limit_s: float,
) -> list[RoleVerification]:
    """Replay variants in a worker, each with a time limit."""
    for _, variant in variants:
        model = graph_of(bundle, variant, backend_name, options.device)
        settled = with_axes(bundle, variant, options)
        if not module_of(backend_name).is_prepared(model, settled):
            prepare_apart(backend_name, model, settled)
    results: list[RoleVerification] = []

    def report(message: dict[str, Any]) -> None:
        placement = Placement(**message.pop("placement"))
        tolerance = variants[len(results)][1].tolerance
        results.append(RoleVerification(placement=placement, tolerance=tolerance, **message))

    def label() -> str:
        role, variant = variants[min(len(results), len(variants) - 1)]
        return f"{bundle.path}: replaying {role}/{variant.name} in {backend_name}"

    request = {
        "bundle": str(bundle.path.absolute()),
        "backend": backend_name,
        "options": options_to_json(options),
        "variants": [[role, variant.name] for role, variant in variants],
    }
    run_apart(Path(__file__), request, report, label=label, limit_s=limit_s)
    return results


def _work(request: dict[str, Any], report: Report) -> None:
    bundle = open_bundle(request["bundle"])
    golden = bundle.golden()
    options = options_from_json(request["options"])
    for role, name in request["variants"]:
        variant = bundle.variant(role, name)
        result = asdict(_replay(bundle, golden, role, variant, request["backend"], options))
        report({name: value for name, value in result.items() if name != "tolerance"})


def open_in_time(
    bundle: Bundle, role: str, variant: Variant, backend_name: str, options: SessionOptions
) -> Session:
    """Open a variant for the first time here, trying it in a worker if it may not end.

    Only loops may: a graph that holds one is replayed in a worker before it is opened here.

    Args:
        bundle: An opened bundle.
        role: The variant's role.
        variant: What to open.
        backend_name: What runs it.
        options: How, the device settled.

    Raises:
        BackendError, InputError: As for open_variant.
        TimeLimitError: If it takes too long to open or to replay.
    """
    limit_s = time_limit()
    if limit_s is not None:
        model = graph_of(bundle, variant, backend_name, options.device)
        if read_onnx_file(model).may_loop:
            replay_variants(bundle, [(role, variant)], backend_name, options, limit_s)
    return open_variant(bundle, variant, backend_name=backend_name, options=options)


def replay(
    session: Session, golden: Golden, role: str, variant: Variant, state: State | None
) -> RoleVerification:
    """Run the golden inputs of a role and compare the outputs with the golden ones.

    A role with a state runs them once more in several calls, see mmedge.runtimes.steps.

    Args:
        session: The variant, opened.
        golden: The bundle's golden vectors.
        role: Role name.
        variant: What the session runs.
        state: Of the role, None where it has none.

    Raises:
        BackendError: If the engine fails.
    """
    feed = golden.inputs[role]
    outputs = session.run(feed)
    cosine_min, max_abs_error = _compare(outputs, golden.outputs[role][variant.name])
    if state is not None:
        steps = _compare(run_steps(session, state, feed), golden.steps[role][variant.name])
        cosine_min = float(np.minimum(cosine_min, steps[0]))  # NaN stays
        max_abs_error = float(np.maximum(max_abs_error, steps[1]))
    tolerance = variant.tolerance
    return RoleVerification(
        role=role,
        variant=variant.name,
        placement=session.placement,
        samples=len(next(iter(feed.values()))),
        cosine_min=cosine_min,
        max_abs_error=max_abs_error,
        tolerance=tolerance,
        # NaN compares false, so a non-finite output never passes.
        passed=cosine_min >= tolerance.cosine_min and max_abs_error <= tolerance.max_abs_error,
    )


def _compare(outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[float, float]:
    """Return the lowest cosine and largest relative error over all outputs and samples."""
    cosines, errors = [1.0], [0.0]
    for name, golden in expected.items():
        output = outputs.get(name)
        if output is None or output.shape != golden.shape:
            return float("nan"), float("nan")
        found = difference(golden, output, Compare.VALUES)
        cosines.append(float(np.min(found.cosines, initial=1.0)))
        errors.append(found.max_abs_error / found.scale)
    return float(np.min(cosines)), float(np.max(errors))


if __name__ == "__main__":
    serve(_work)
