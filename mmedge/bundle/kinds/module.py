"""Modules: any graph with named inputs and outputs."""

from __future__ import annotations

from typing import Literal

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.tensors import RoleName

__all__ = ["ModuleKind"]


class ModuleKind(KindBase):
    """The section of a module.

    Attributes:
        role: Its only role.
    """

    type: Literal["module"] = "module"
    role: RoleName = "module"

    def role_names(self) -> tuple[str, ...]:
        """Return the module's role."""
        return (self.role,)
