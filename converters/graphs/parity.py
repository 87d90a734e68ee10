"""Parity of a graph with its source, at several sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmedge.bundle.differences import difference
from mmedge.bundle.quality import Parity
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.nan_trace import first_nan_module
from mmedge.converters.graphs.worker import IsolatedGraph, Worker
from mmedge.errors import ExportError, ParityError
from mmedge.specs import Array

__all__ = ["Probe", "measure_parity", "probe_role", "require_parity"]

_COSINE_MIN = 0.9999
_MAX_ABS_ERROR = 1e-3


@dataclass(frozen=True)
class Probe:
    """Inputs of a role and reference outputs, by name."""

    feed: Mapping[str, Array]
    expected: Mapping[str, Array]


def probe_role(
    spec: RoleSpec, feeds: Sequence[dict[str, torch.Tensor]] | None = None
) -> tuple[Probe, ...]:
    """Run the source on feeds, by default of the traced sizes and of every other checked size.

    Raises:
        ExportError: If an output of the source is not finite; the first such part is
            named.
        BackendError: If the source is a graph that ONNX Runtime cannot run.
    """
    if feeds is None:
        sizes = (spec.trace_sizes, *spec.proof_sizes)
        feeds = [spec.sample(each, seed) for seed, each in enumerate(sizes, start=1)]
    if spec.module is None:
        return tuple(_probe_graph(spec, feeds))
    return tuple(_probe_module(spec, spec.module, feed) for feed in feeds)


def _probe_module(spec: RoleSpec, module: torch.nn.Module, feed: dict[str, torch.Tensor]) -> Probe:
    inputs = [feed[item.name] for item in spec.inputs]
    with torch.inference_mode():
        outputs = _tensors(module.eval()(*inputs))
        for output in outputs:
            if output.is_floating_point() and not torch.isfinite(output).all():
                raise ExportError(
                    "The PyTorch model itself gives NaN or infinity, first in "
                    f"{first_nan_module(module, inputs)}. Download or repair its weights."
                )
    names = (item.name for item in spec.outputs)
    return Probe(
        {item.name: feed[item.name].numpy() for item in spec.inputs},
        {name: output.numpy() for name, output in zip(names, outputs, strict=True)},
    )


def _probe_graph(spec: RoleSpec, feeds: Iterable[dict[str, torch.Tensor]]) -> Iterator[Probe]:
    assert spec.graph is not None  # noqa: S101, a role has a module or a graph
    with Worker() as worker, worker.open(spec.graph, spec.graph.name) as graph:
        for tensors in feeds:
            feed = {name: tensor.numpy() for name, tensor in tensors.items()}
            expected = graph.run(feed)
            for name, output in expected.items():
                if output.dtype.kind == "f" and not np.isfinite(output).all():
                    raise ExportError(
                        f"{spec.graph.name}: output '{name}' is NaN or infinite for random inputs "
                        "of normal distribution. Check the graph."
                    )
            yield Probe(feed, expected)


def _tensors(outputs: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def measure_parity(
    label: str, graph: IsolatedGraph, spec: RoleSpec, probes: Sequence[Probe]
) -> Parity:
    """Compare a graph with its source, every output by its comparison.

    Args:
        label: What the graph is called in errors ("image_encoder/fp32").
        graph: The graph.
        spec: The role.
        probes: The source's outputs.

    Raises:
        ParityError: If an output has another shape or is not finite.
        BackendError: If ONNX Runtime cannot run the graph.
    """
    errors: list[float] = []
    values: list[Array] = []
    agreements: list[Array] = []
    for probe in probes:
        outputs = graph.run(probe.feed)
        for name, expected in probe.expected.items():
            got = outputs[name]
            if got.shape != expected.shape:
                raise ParityError(
                    f"{label}: for inputs {_shapes(probe.feed)} output '{name}' is {got.shape}, "
                    f"expected {expected.shape}. The export has frozen an axis; please report the "
                    "model."
                )
            if got.dtype.kind == "f" and not np.isfinite(got).all():
                raise ParityError(
                    f"{label}: output '{name}' is NaN or infinite where the source's is not. Leave "
                    "this precision out."
                )
            if name not in spec.verified:
                continue
            # State shows in the calls after it; here it counts by its values.
            found = difference(expected, got, spec.compared(name))
            errors.append(found.max_abs_error / found.scale)
            values.append(found.cosines)
            if found.agreements is not None:
                agreements.append(found.agreements)
    every = np.concatenate(values)
    return Parity(
        max_abs_error=max(errors),
        cosine_mean=float(every.mean()),
        cosine_min=float(every.min()),
        token_agreement=float(np.concatenate(agreements).mean()) if agreements else None,
        samples=len(every),
    )


def _shapes(feed: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in feed.items())


def require_parity(label: str, parity: Parity) -> None:
    """Check that an fp32 graph agrees with its source.

    Raises:
        ParityError: If it does not; the figures are in the message.
    """
    if parity.cosine_min < _COSINE_MIN or parity.max_abs_error > _MAX_ABS_ERROR:
        raise ParityError(
            f"{label}: the exported graph does not agree with the PyTorch model: smallest "
            f"cosine {parity.cosine_min:.6f} (expected at least {_COSINE_MIN}), largest error "
            f"{parity.max_abs_error:.2e} (expected at most {_MAX_ABS_ERROR:.0e}). Nothing was "
            "written; please report the model."
        )
