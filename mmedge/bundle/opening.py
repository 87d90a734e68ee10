"""Opening a bundle: reads and checks the manifest, finds the files, loads nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedge.bundle.golden import Golden, load_golden
from mmedge.bundle.manifest import Layout, Manifest, Role, Variant
from mmedge.bundle.nodes import NodeTable, load_nodes
from mmedge.bundle.paths import MANIFEST_NAME, confined_path
from mmedge.bundle.reading import read_manifest
from mmedge.bundle.tensors import TensorEntry
from mmedge.errors import BundleError, InputError, IntegrityError, ManifestError
from mmedge.notebook import html_table
from mmedge.specs import Array, State, did_you_mean

__all__ = ["Bundle", "open_bundle"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        manifest: Its manifest, checked.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        roles = ", ".join(
            f"{name} ({', '.join(variant.name for variant in role.variants)})"
            for name, role in self.manifest.roles.items()
        )
        return f"<Bundle {self.path}: {self.manifest.kind.type} {self.manifest.name}: {roles}>"

    def _repr_html_(self) -> str:
        rows = (
            (name, variant.name, f"{variant.size_bytes / 1e6:.3g}", "yes" * (variant is default))
            for name, role in self.manifest.roles.items()
            for default in [self.variant(name)]
            for variant in role.variants
        )
        caption = f"{self.manifest.kind.type} {self.manifest.name}, {self.path}"
        return html_table(caption, ("role", "variant", "MB", "default"), rows)

    def file(self, relative: str) -> Path:
        """Return the path of a file of the bundle.

        Args:
            relative: POSIX path from the bundle's folder.

        Raises:
            IntegrityError: If the file is missing or lies outside the bundle.
        """
        return confined_path(self.path, relative)

    def role(self, name: str) -> Role:
        """Return a role by name.

        Raises:
            InputError: If the bundle has none of that name; those it has are listed.
        """
        roles = self.manifest.roles
        if name not in roles:
            raise InputError(f"{self.path} has no role '{name}', expected one of {list(roles)}.")
        return roles[name]

    def variant(self, role: str, precision: str | None = None) -> Variant:
        """Return a variant of a role.

        Args:
            role: Role name.
            precision: None for the role's default; a precision ("int8") for the first
                variant that has it, or the exact name of a variant ("int8-static"). An exact name
                is looked for first.

        Raises:
            InputError: If there is no such role or variant; those there are are listed.
        """
        held = self.role(role)
        variants = held.variants
        if precision is None:
            precision = held.default
        # str() of a Precision is "Precision.INT8"; variants are compared with its value.
        wanted = str(getattr(precision, "value", precision))
        for variant in variants:
            if variant.name == wanted:
                return variant
        for variant in variants:
            if variant.precision.value == wanted:
                return variant
        raise InputError(
            f"{self.path}: role '{role}' has no variant '{wanted}', expected one of "
            f"{[variant.name for variant in variants]}."
            f"{did_you_mean(wanted, [variant.name for variant in variants])} "
            "Convert again with --precision to add one."
        )

    def no_variant(self, wanted: str, roles: Sequence[str]) -> str:
        """Return the message for a variant that no role has, listing those that exist."""
        held = {role: [variant.name for variant in self.role(role).variants] for role in roles}
        listed = "; ".join(f"{role}: {', '.join(names)}" for role, names in held.items())
        names = dict.fromkeys(name for names in held.values() for name in names)
        return (
            f"{self.path} has no variant '{wanted}', expected one of {listed}."
            f"{did_you_mean(wanted, names)} Convert again with --precision to add one."
        )

    def model_path(
        self, variant: Variant, *, layouts: Sequence[Layout] = ("onnxruntime", "portable")
    ) -> Path:
        """Return a variant's ONNX file.

        Args:
            variant: From `variant`.
            layouts: Layouts that the caller can take, the preferred one first.

        Raises:
            InputError: If the variant has none of these layouts.
            IntegrityError: If the file is missing or lies outside the bundle.
        """
        for layout in layouts:
            if layout in variant.models:
                return self.file(variant.models[layout])
        raise InputError(
            f"{self.path}: variant '{variant.name}' has no model in {list(layouts)}, only in "
            f"{list(variant.models)}. Ask for one of those, or convert again."
        )

    def nodes(self, variant: Variant) -> NodeTable | None:
        """Read the node table of a variant; None if it has none.

        Args:
            variant: From `variant`.

        Raises:
            ManifestError: If the table is malformed, too large or too new.
            IntegrityError: If the file is missing, lies outside the bundle, or describes another
                variant.
        """
        if variant.nodes is None:
            return None
        table = load_nodes(self.file(variant.nodes))
        role = self.manifest.roles.get(table.role)
        if table.variant != variant.name or role is None or variant not in role.variants:
            raise IntegrityError(
                f"{self.path}: node table '{variant.nodes}' describes "
                f"{table.role!r}/{table.variant!r}, not of variant '{variant.name}' that names it. "
                "Copy the bundle again, or convert again."
            )
        return table

    def golden(self) -> Golden:
        """Read the golden vectors and check them against the roles and variants.

        Raises:
            IntegrityError: If the file is missing or damaged, or a tensor is not one of its role.
        """
        golden = load_golden(self.file(self.manifest.golden))
        for name, role in self.manifest.roles.items():
            self._check_golden(f"inputs of {name}", golden.inputs.get(name, {}), role.inputs)
            outputs, steps = golden.outputs.get(name, {}), golden.steps.get(name, {})
            made = set() if role.state is None else {t.output for t in role.state.tensors}
            stepped = [e for e in role.verified if e.name not in made] if role.state else []
            for variant in role.variants:
                label = f"{name}/{variant.name}"
                self._check_golden(
                    f"outputs of {label}", outputs.get(variant.name, {}), role.verified
                )
                self._check_golden(f"steps of {label}", steps.get(variant.name, {}), stepped)
        return golden

    def state_of(self, role: str) -> State | None:
        """Return the state of a role, None if it is stateless."""
        entry = self.role(role).state
        return None if entry is None else entry.state()

    def _check_golden(
        self, what: str, arrays: Mapping[str, Array], entries: Sequence[TensorEntry]
    ) -> None:
        expected = sorted(entry.name for entry in entries)
        if sorted(arrays) != expected:
            raise IntegrityError(
                f"{self.path}: golden {what}: got {sorted(arrays)}, expected {expected}. "
                "Convert the model again."
            )
        for spec in (entry.spec() for entry in entries):
            array = arrays[spec.name]
            if (
                array.dtype != spec.dtype
                or array.ndim != len(spec.shape)
                or any(
                    isinstance(d, int) and n != d
                    for n, d in zip(array.shape, spec.shape, strict=True)
                )
            ):
                raise IntegrityError(
                    f"{self.path}: golden {what}: '{spec.name}' is {array.dtype.name}"
                    f"{array.shape}, expected {spec}. Convert the model again."
                )


def open_bundle(path: Path | str) -> Bundle:
    """Open a bundle: read its manifest, find its files, compare their sizes.

    Hashes are left to verify_files, so that opening takes milliseconds whatever the size.

    Raises:
        BundleError: If there is no folder at `path`.
        ManifestError: If the manifest is missing, malformed, too new or self-contradictory.
        IntegrityError: If a file is missing, has another size, or lies outside the bundle.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BundleError(f"Cannot open bundle: got {type(path).__name__}, expected a path.")
    folder = Path(path)
    try:
        found = folder.is_dir()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BundleError(f"Cannot open bundle {str(folder)!r}: {error}.") from error
    if not found:
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise BundleError(
            f"Cannot open bundle {folder}: it {what}. Pass the folder that mmedge convert made."
        )
    if not (folder / MANIFEST_NAME).is_file():
        raise ManifestError(
            f"{folder} has no {MANIFEST_NAME}: it is not a bundle, or was copied in part. "
            "Pass the folder that mmedge convert made, or copy it again."
        )
    bundle = Bundle(folder, read_manifest(confined_path(folder, MANIFEST_NAME)))
    for relative, entry in bundle.manifest.files.items():
        size_bytes = bundle.file(relative).stat().st_size
        if size_bytes != entry.size_bytes:
            raise IntegrityError(
                f"{folder}: file '{relative}' has {size_bytes} bytes, expected "
                f"{entry.size_bytes}. It is changed or cut off: copy the bundle again."
            )
    return bundle
