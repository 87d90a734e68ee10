"""Fused heads: a head over the taps of encoders in other bundles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.kinds.heads import HeadSection
from mmedge.bundle.tensors import RoleName

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["FusedKind"]


class FusedKind(KindBase):
    """The section of a fused head.

    Attributes:
        role: Its role.
        head: What it reads and means.
    """

    type: Literal["fused"] = "fused"
    role: RoleName = "head"
    head: HeadSection

    def role_names(self) -> tuple[str, ...]:
        """Return the head's role."""
        return (self.role,)

    def files(self) -> Iterator[str]:
        """Yield the file of learned defaults."""
        if self.head.defaults is not None:
            yield self.head.defaults

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the inputs and the labels."""
        yield from self.head.facts()

    def check(self, manifest: Manifest) -> None:
        """Check the head against its graph.

        Raises:
            ValueError: If they contradict each other.
        """
        self.head.check(self.role, manifest.roles[self.role])
