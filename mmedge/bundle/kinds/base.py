"""What every kind's section of the manifest offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["KindBase"]


class KindBase(BaseModel):
    """Base of the typed sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def role_names(self) -> tuple[str, ...]:
        """Return the roles that this kind of model uses; a bundle holds these and no others."""
        raise NotImplementedError

    def files(self) -> Iterator[str]:
        """Yield the files of the bundle that the section names."""
        yield from ()

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what `mmedge inspect` shows of the section: name and value."""
        yield from ()

    def check(self, manifest: Manifest) -> None:
        """Check the section against the rest of the manifest.

        Raises:
            ValueError: If they contradict each other.
        """
