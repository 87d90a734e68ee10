"""The page on what a search tried and what became of each node, written by two commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmedge.bundle import Bundle

__all__ = ["write_search_page"]


def write_search_page(bundle: Bundle, file: Path) -> None:
    """Write the page.

    Args:
        bundle: What it is about.
        file: HTML file to write.

    Raises:
        InputError: If the bundle holds neither a search nor a node table.
        ManifestError: If a node table cannot be read.
        StorageError: If the file cannot be written.
    """
    from mmedge.errors import InputError
    from mmedge.files import write_atomic
    from mmedge.reports.html_tuning import render_search

    manifest = bundle.manifest
    nodes = {
        f"{name}/{variant.name}": table
        for name, role in manifest.roles.items()
        for variant in role.variants
        if (table := bundle.nodes(variant)) is not None
    }
    if not nodes and all(role.search is None for role in manifest.roles.values()):
        raise InputError(
            f"{bundle.path} holds neither a search nor node tables, so there is nothing for --html "
            "to show. Convert again with 'mmedge convert --precision auto' or '--explain'."
        )
    write_atomic(file, render_search(manifest, nodes).encode())
