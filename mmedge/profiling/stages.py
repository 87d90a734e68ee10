"""Where the time of one end-to-end call goes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.models.dual_encoder import IMAGE_ENCODER, TEXT_ENCODER, DualEncoder
from mmedge.models.load import load
from mmedge.preprocess.decode import decode_image
from mmedge.profiling.config import Budget, ProfileConfig
from mmedge.profiling.inputs import FRAME_SIZE, TEXT, input_kind
from mmedge.profiling.machine import noise
from mmedge.profiling.result import StageBreakdown
from mmedge.profiling.statistics import summarize
from mmedge.profiling.timing import Call, measure
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.specs import Array

__all__ = ["measure_stages", "stage_names_of"]

_NOISY = 0.05  # share of the call by which its stages may exceed it
_IMAGE_STAGES = ("decode", "resize", "normalize", "inference", "other")
_TEXT_STAGES = ("tokenize", "inference", "other")


def stage_names_of(bundle: Bundle, role: str) -> Sequence[str]:
    """Return the stages of a role's end-to-end call; none where no call of ours takes raw input."""
    kind = input_kind(bundle, role)
    if role == IMAGE_ENCODER and kind == "image":
        return _IMAGE_STAGES
    if role == TEXT_ENCODER and kind == "text":
        return _TEXT_STAGES
    return ()


def measure_stages(
    bundle: Bundle,
    role: str,
    variant: Variant,
    jpeg: bytes,
    options: SessionOptions,
    config: ProfileConfig,
    budget: Budget,
) -> StageBreakdown:
    """Measure an end-to-end call, and each of its stages alone, in turn.

    The end-to-end call is the one that a user makes: `encode_image` on the bytes of a JPEG, or
    `encode_text` on a sentence. What it takes beyond the sum of its stages is "other": copies into
    the batch, checks, Python. Where the stages alone took longer than the call, "other" is 0 and
    the difference is among the reasons to doubt the figures.

    Args:
        bundle: The bundle.
        role: One that `stage_names_of` has stages for.
        variant: Of that role.
        jpeg: A picture.
        options: Device and threads.
        config: For the backend.
        budget: For each of the calls.

    Raises:
        BackendError: If the engine fails.
    """
    with load(
        bundle.path,
        precision=variant.name,
        backend=config.backend,
        roles=[role],
        options=options,
    ) as model:
        if role == IMAGE_ENCODER:
            calls = _image_calls(model, jpeg)
            shown = f"{FRAME_SIZE[0]}x{FRAME_SIZE[1]} JPEG of {len(jpeg) / 1000:.0f} kB"
        else:
            calls = _text_calls(model)
            shown = f"{len(model.text_processor.tokenize([TEXT])[0])} tokens"
        whole, *parts = measure(list(calls.values()), budget)
    medians = [statistics.median(part.wall_ns) / 1e6 for part in parts]
    stages = dict(zip(list(calls)[1:], medians, strict=True))
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
        input=shown,
        stages_ms=stages,
        sum_ms=sum(medians),
        end_to_end=latency,
        noise=reasons,
    )


def _image_calls(model: DualEncoder, jpeg: bytes) -> dict[str, Call]:
    processor = model.image_processor
    image = decode_image(jpeg)
    frames = processor.resize(image)[None]
    feed = {processor.config.input: processor.normalize(frames)}
    return {
        "end to end": lambda: model.encode_image(jpeg),
        "decode": lambda: decode_image(jpeg),
        "resize": lambda: processor.resize(image),
        "normalize": lambda: processor.normalize(frames),
        "inference": _inference(model.sessions[IMAGE_ENCODER], feed),
    }


def _text_calls(model: DualEncoder) -> dict[str, Call]:
    processor = model.text_processor
    return {
        "end to end": lambda: model.encode_text(TEXT),
        "tokenize": lambda: processor([TEXT]),
        "inference": _inference(model.sessions[TEXT_ENCODER], processor([TEXT])),
    }


def _inference(session: Session, feed: dict[str, Array]) -> Call:
    ready = {spec.name: feed[spec.name].astype(spec.dtype, copy=False) for spec in session.inputs}
    return lambda: session.run(ready)
