"""add_head(): a head moved into the bundle of its encoders."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from mmedge.bundle.creating import create_bundle, describe_files, write_manifest
from mmedge.bundle.golden import save_golden
from mmedge.bundle.kinds import EmbeddingKind, FusedKind
from mmedge.bundle.kinds.heads import HeadInput
from mmedge.bundle.manifest import Manifest
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.bundle.verifying import verify_files
from mmedge.errors import BundleError, SpaceMismatchError
from mmedge.files import storage_errors

__all__ = ["add_head"]


def add_head(
    encoder: Path | str, head: Path | str, out: Path | str, *, overwrite: bool = False
) -> Manifest:
    """Write a bundle that holds encoders and a head on them, so that one `load` opens both.

    Args:
        encoder: Bundle of the encoders; it may hold other heads.
        head: The head's bundle.
        out: The bundle to write.
        overwrite: Overwrite an existing bundle.

    Returns:
        The new bundle's manifest.

    Raises:
        BundleError: If one is of another kind, damaged, or has a role of the head's name.
        SpaceMismatchError: If the head was trained on another encoder.
        StorageError: If the disk is full or the place cannot be written.
    """
    encoders, added = open_bundle(encoder), open_bundle(head)
    kind, section = encoders.manifest.kind, added.manifest.kind
    if not isinstance(kind, EmbeddingKind) or not isinstance(section, FusedKind):
        raise BundleError(
            f"add_head: got {encoders.path}, a {kind.type} bundle, and {added.path}, a "
            f"{section.type} bundle; expected encoders and a fused head on them."
        )
    role = section.role
    if role in encoders.manifest.roles:
        raise BundleError(
            f"{encoders.path} has a role '{role}' already. Rename the head: convert it to a bundle "
            "of another name."
        )
    for name, each in section.head.inputs.items():
        if each.tap is not None and each.space not in _spaces(encoders, kind, each):
            raise SpaceMismatchError(
                f"{added.path}: input '{name}' reads '{each.tap}' of {each.space}, which "
                f"{encoders.path} does not have. Pass the encoder that the head was trained on."
            )
    for bundle in (encoders, added):
        verify_files(bundle)
    with create_bundle(out, overwrite=overwrite) as folder:
        for bundle, left_out in ((encoders, ""), (added, added.manifest.golden)):
            for path in bundle.manifest.files:
                if path != left_out:
                    _copy(bundle, path, folder)
        golden, more = encoders.golden(), added.golden()
        save_golden(
            folder / encoders.manifest.golden,
            replace(
                golden,
                inputs={**golden.inputs, **more.inputs},
                outputs={**golden.outputs, **more.outputs},
                steps={**golden.steps, **more.steps},
            ),
        )
        manifest = encoders.manifest.model_copy(
            update={
                "kind": kind.model_copy(update={"heads": {**kind.heads, role: section.head}}),
                "roles": {**encoders.manifest.roles, **added.manifest.roles},
                "files": describe_files(folder),
            }
        )
        write_manifest(folder, manifest)
    return manifest


def _spaces(bundle: Bundle, kind: EmbeddingKind, each: HeadInput) -> set[str | None]:
    """Return the fingerprints that an encoder's variants offer."""
    role = None if each.modality is None else kind.encoders.get(each.modality)
    variants = () if role is None else bundle.role(role).variants
    return {space for one in variants for space in (one.space, *one.taps.values())}


def _copy(bundle: Bundle, path: str, folder: Path) -> None:
    target = folder / path
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(path), target)
