"""Registry of processor classes by configuration type."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from mmedge.preprocess.config import ProcessorConfig
from mmedge.specs import Array, Modality

__all__ = ["PROCESSORS", "Processor", "open_processor"]

PROCESSORS: dict[str, str] = {
    "image": "mmedge.preprocess.image:ImageProcessor",
    "text": "mmedge.preprocess.text:TextProcessor",
    "audio": "mmedge.preprocess.audio:AudioProcessor",
    "vector": "mmedge.preprocess.vector:VectorProcessor",
    "video": "mmedge.preprocess.video:VideoProcessor",
}
"""Module and class by the `type` of a configuration."""


class Processor(Protocol):
    """Stateless converter from samples of one modality to inputs of a graph."""

    modality: ClassVar[Modality]

    @property
    def config(self) -> ProcessorConfig:
        """The frozen configuration."""
        ...

    def example(self) -> Any:  # noqa: ANN401
        """Return an example item for any such processor."""
        ...

    def __call__(self, items: Sequence[Any]) -> dict[str, Array]:
        """Return arrays by graph input, one row per item.

        Raises:
            InputError: If an item cannot be used; its position is named where there are several.
        """
        ...


def open_processor(config: ProcessorConfig, folder: Path) -> Processor:
    """Open the processor of a configuration.

    Args:
        config: From a manifest.
        folder: The bundle's, which the configuration's file names are relative to.

    Raises:
        BundleError: If a file that it needs is missing (IntegrityError) or unusable.
    """
    module, name = PROCESSORS[config.type].split(":")
    return cast(Processor, getattr(import_module(module), name).open(config, folder))
