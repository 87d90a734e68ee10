"""Stage breakdown of end-to-end calls."""

from __future__ import annotations

import statistics

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import ProfileError
from mmedge.models.load import load
from mmedge.profiling.config import Budget, ProfileConfig
from mmedge.profiling.machine import noise
from mmedge.profiling.result import StageBreakdown
from mmedge.profiling.statistics import summarize
from mmedge.profiling.timing import Call, measure
from mmedge.runtimes.session import SessionOptions

__all__ = ["measure_stages"]

_NOISY = 0.05  # share of the call by which the stages may exceed it


def measure_stages(
    bundle: Bundle,
    role: str,
    variant: Variant,
    sample: object,
    options: SessionOptions,
    config: ProfileConfig,
    budget: Budget,
) -> StageBreakdown:
    """Measure an end-to-end call and each of its stages alone, interleaved.

    The end-to-end call is the one that a user makes: `encode_image` on the bytes of a JPEG, or
    `encode_text` on a sentence. What it takes beyond the sum of its stages is "other": copies into
    the batch, checks, Python. Where the stages alone took longer than the call, "other" is 0 and
    the difference is among the reasons to doubt the figures.

    Args:
        bundle: The bundle.
        role: One of its roles.
        variant: Of that role.
        sample: One raw input of the role.
        options: Device and threads.
        config: For the backend.
        budget: For each of the calls.

    Raises:
        BackendError: If the engine fails.
        ProfileError: If the role has no end-to-end call.
    """
    with load(
        bundle.path,
        precision=variant.name,
        backend=config.backend,
        roles=[role],
        options=options,
    ) as model:
        found = model.stages(role, sample)
        if found is None:
            raise ProfileError(f"{role} has no end-to-end call. Omit --stages.")
        calls: list[Call] = [found.whole, *found.parts.values()]
        whole, *parts = measure(calls, budget)
    medians = [statistics.median(part.wall_ns) / 1e6 for part in parts]
    stages = dict(zip(found.parts, medians, strict=True))
    latency = summarize(whole.wall_ns, whole.cpu_ns)
    other = latency.median_ms - sum(medians)
    stages["other"] = max(other, 0.0)
    reasons = noise(latency, threads=1, device=options.device)
    if other < -_NOISY * latency.median_ms:
        reasons += (f"the stages alone took {-other:.2g} ms longer than the end-to-end call",)
    return StageBreakdown(
        role=role,
        variant=variant.name,
        threads=options.threads or 1,
        input=found.input,
        stages_ms=stages,
        sum_ms=sum(medians),
        end_to_end=latency,
        noise=reasons,
    )
