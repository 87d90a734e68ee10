"""Consistency checks of a role's manifest, processors and graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmedge.bundle.manifest import Role
from mmedge.bundle.opening import Bundle
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.errors import BackendError, InputError, ManifestError
from mmedge.preprocess.config import ProcessorConfig, TextConfig
from mmedge.preprocess.registry import open_processor
from mmedge.preprocess.text import TextProcessor
from mmedge.runtimes.session import Session
from mmedge.specs import Array, TensorSpec

__all__ = ["check_graph", "check_processing"]


def check_graph(path: Path, name: str, role: Role, session: Session) -> None:
    """Check that a graph has the inputs and outputs of its role.

    An axis that the graph leaves open may be fixed in the manifest, and an output's may be open
    in the manifest.

    Args:
        path: The bundle's folder, for messages.
        name: Role name.
        role: From the manifest.
        session: The graph, opened.

    Raises:
        ManifestError: If a name, a dtype or a shape differs.
    """
    pairs = (("input", role.inputs, session.inputs), ("output", role.outputs, session.outputs))
    for kind, entries, found in pairs:
        stated = [entry.spec() for entry in entries]
        fault = _difference(stated, found, kind)
        if fault is not None:
            raise ManifestError(
                f"{path}: the manifest and the graph of {name} differ in {kind} {fault}. Copy the "
                "bundle again, or convert again."
            )


def check_processing(bundle: Bundle, name: str, session: Session) -> None:
    """Run an example through a role's processors and its graph, and the largest token ids.

    A role that also takes state or other roles' outputs is left to the golden vectors.

    Args:
        bundle: An opened bundle.
        name: Role name.
        session: The role's graph, opened.

    Raises:
        BundleError: If a processor cannot be opened (ManifestError, IntegrityError), or what it
            makes cannot be run, or gives an output that is not finite or of another shape than
            the manifest says.
    """
    specs = {spec.name: spec for spec in session.inputs}
    feeds: list[tuple[str, dict[str, Array]]] = []
    made: dict[str, Array] = {}
    for config in _processors(bundle, name):
        processor = open_processor(config, bundle.path)
        try:
            made |= processor([processor.example()])
        except InputError as error:
            raise _misfit(bundle, name, f"the {config.type} processor fails: {error}") from error
        if isinstance(processor, TextProcessor):
            _check_length(bundle, name, processor.config)
            what = f"token id {processor.largest_id}, the largest of tokenizer and pad_id,"
            feeds.append((what, {config.input: np.array(processor.largest_id)}))
    if unknown := sorted(made.keys() - specs.keys()):
        raise _misfit(bundle, name, f"its processors make '{unknown[0]}', which the graph lacks")
    if made.keys() != specs.keys():
        return
    for what, other in [("the processors' output for an example", {}), *feeds]:
        feed = {
            key: np.resize(other.get(key, array), array.shape).astype(specs[key].dtype)
            for key, array in made.items()
        }
        try:
            outputs = session.run(feed)
        except (InputError, BackendError) as error:
            raise _misfit(bundle, name, f"{what} cannot be run: {error}") from error
        for entry in bundle.role(name).outputs:
            array = outputs[entry.name]
            if _difference([entry.spec()], [TensorSpec(entry.name, array.dtype, array.shape)]):
                got = f"{array.dtype.name}{array.shape}"
                raise _misfit(
                    bundle, name, f"output '{entry.name}': got {got}, expected {entry.spec()}"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise _misfit(bundle, name, f"{what} makes output '{entry.name}' not finite")


def _check_length(bundle: Bundle, name: str, config: TextConfig) -> None:
    """Check that the axis of token ids covers the processor's max_length."""
    role = bundle.role(name)
    ids = next(entry for entry in role.inputs if entry.name == config.input)
    for dim in ids.shape[1:]:
        longest = role.axes[dim].max if dim in role.axes else dim
        if isinstance(longest, int) and longest < config.max_length:
            fault = f"takes {longest} tokens, below max_length {config.max_length} of its texts"
            raise _misfit(bundle, name, fault)


def _processors(bundle: Bundle, name: str) -> tuple[ProcessorConfig, ...]:
    """Return the configurations of the processors that feed a role."""
    feeds = (entry.feed for entry in bundle.role(name).inputs)
    names = dict.fromkeys(feed.processor for feed in feeds if isinstance(feed, ProcessorFeed))
    return tuple(bundle.manifest.processors[each] for each in names)


def _misfit(bundle: Bundle, name: str, fault: str) -> ManifestError:
    return ManifestError(
        f"{bundle.path}: role {name}: {fault}. Copy the bundle again, or convert again."
    )


def _difference(
    stated: Sequence[TensorSpec], found: Sequence[TensorSpec], kind: str = "output"
) -> str | None:
    """Return the first difference between manifest and graph; None if they match."""
    by_name = {spec.name: spec for spec in found}
    if by_name.keys() != {spec.name for spec in stated}:
        return f"names: {sorted(spec.name for spec in stated)} stated, {sorted(by_name)} in it"
    for spec in stated:
        other = by_name[spec.name]
        same = spec.dtype == other.dtype and len(spec.shape) == len(other.shape)
        if not same or not all(
            ours == theirs
            or isinstance(theirs, str)
            or (kind == "output" and isinstance(ours, str))
            for ours, theirs in zip(spec.shape, other.shape, strict=True)
        ):
            return f"'{spec.name}': {spec} stated, {other} in it"
    return None
