"""convert_module(): bundles of a user's own PyTorch modules, heads among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmedge.bundle.kinds import FusedKind, ModuleKind
from mmedge.bundle.kinds.heads import HeadSection
from mmedge.bundle.tensors import CallerFeed, Feed
from mmedge.converters.described import Described
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.onnx_graph import draw_inputs, usual_axes
from mmedge.converters.graphs.parity import probe_role
from mmedge.converters.heads.base import HeadSpec, head_sample, role_name
from mmedge.converters.pipeline import convert_model
from mmedge.converters.progress import ignore_progress
from mmedge.converters.request import read_data
from mmedge.converters.sources.fingerprint import tensors_sha256
from mmedge.converters.sources.source import Source
from mmedge.errors import ConversionError
from mmedge.specs import Axis, Compare, State, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.progress import Progress
    from mmedge.converters.report import ConversionReport
    from mmedge.preprocess.config import ProcessorConfig

__all__ = ["convert_head_role", "convert_module"]


def convert_module(  # noqa: PLR0913, what a graph is made from
    module: nn.Module,
    config: ConvertConfig,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    axes: Mapping[str, Axis] | None = None,
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]] | None = None,
    feeds: Mapping[str, Feed] | None = None,
    compare: Mapping[str, Compare] | None = None,
    processors: Mapping[str, ProcessorConfig] | None = None,
    state: State | None = None,
    head: HeadSpec | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a PyTorch module to a bundle of kind `module`, or of kind `fused` if it is a head.

    Args:
        module: Takes the inputs in their order; returns one tensor or a tuple in the outputs'.
        config: Settings; `source` is a name for the provenance. Calibration and evaluation data
            are .npz files with an array for each input that callers give.
        inputs: Specs of the inputs; a str in a shape names a dynamic axis.
        outputs: Specs of the outputs.
        axes: Bounds of the dynamic axes; None takes 1 to 8 for a batch and 1 to 512 for others.
        sample: Makes inputs of given sizes from a seed; None draws normal
            floats, and integers 0 or 1.
        feeds: Where inputs come from that no caller gives, by name: a processor, or the state.
        compare: How outputs are compared, by name; None compares all by values.
        processors: Preprocessing by name, for inputs fed by one.
        state: What calls hand to each other.
        head: Which inputs are taps of encoders or arrays of sensors, for a head. Evaluation data
            may hold `labels` then, for accuracy.
        progress: Progress callback.

    Raises:
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    specs = tuple(inputs)
    bounds = dict(axes or usual_axes(specs))
    role = RoleSpec(
        module=module.eval(),
        inputs=specs,
        outputs=tuple(outputs),
        axes=bounds,
        sample=sample or (lambda sizes, seed: draw_inputs(specs, sizes, seed)),
        trace_sizes={name: max(2, axis.min) for name, axis in bounds.items()},
        proof_sizes=tuple(
            {name: max(n, axis.min) for name, axis in bounds.items()} for n in (1, 3)
        ),
        feeds={item.name: (feeds or {}).get(item.name, CallerFeed()) for item in specs},
        compare=compare or {item.name: Compare.VALUES for item in outputs},
        state=state,
    )
    weights = tensors_sha256(module)
    if head is not None:
        return convert_head_role(role, config, head, weights, progress)
    model = ModelSpec(ModuleKind(), (), {"module": lambda: role}, processors or {})
    return _convert(config, model, weights, progress)


def convert_head_role(
    role: RoleSpec,
    config: ConvertConfig,
    head: HeadSpec,
    weights_sha256: str,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a described head to a bundle of kind `fused`.

    Args:
        role: Its graph; every input is given by the caller.
        config: Settings.
        head: What it reads.
        weights_sha256: Hash of its weights.
        progress: Progress callback.

    Raises:
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    name = role_name(config.out.stem)
    section = head.section(role.inputs, name)
    spec = replace(role, sample=head_sample(role.sample, section))
    _check_marginalized(spec, section, config.seed)
    kind = FusedKind(role=name, head=section)
    model = ModelSpec(kind, (), {name: lambda: spec}, {}, head.files(name))
    return _convert(config, model, weights_sha256, progress)


def _convert(
    config: ConvertConfig, model: ModelSpec, weights_sha256: str, progress: Progress | None
) -> ConversionReport:
    source = Source(Path(), config.source, None, {"model_type": model.kind.type}, (), {})
    described = Described(source, model.kind.type, model, weights_sha256)
    return convert_model(config, read_data(config), lambda: described, progress or ignore_progress)


def _check_marginalized(spec: RoleSpec, section: HeadSection, seed: int) -> None:
    """Check that an input that is said to be absent changes nothing.

    Args:
        spec: The head.
        section: What it reads.
        seed: Of the inputs that it is run on.

    Raises:
        ConversionError: If outputs depend on the value of an absent input.
        BackendError: If the head is a graph that ONNX Runtime cannot run.
    """
    if section.present is None:
        return
    feed = spec.sample(spec.trace_sizes, seed)
    for at, name in enumerate(section.marginalized):
        present = torch.ones_like(feed[section.present])
        present[:, at] = False
        values = (torch.zeros_like(feed[name]), torch.ones_like(feed[name]) * 3)
        feeds = [{**feed, section.present: present, name: value} for value in values]
        left, right = (probe.expected for probe in probe_role(spec, feeds))
        if any(not np.array_equal(left[key], right[key]) for key in left):
            raise ConversionError(
                f"Head input '{name}' is marginalized, but the outputs depend on its value where "
                f"'{section.present}' says that it is absent. Mask it in the module "
                "(torch.where(present, expert, 0)), or choose another policy."
            )
