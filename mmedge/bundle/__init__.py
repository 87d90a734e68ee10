"""Bundles: model folders that move from workstation to device."""

from mmedge.bundle.creating import create_bundle, describe_files, write_manifest
from mmedge.bundle.golden import Golden, load_golden, save_golden
from mmedge.bundle.manifest import Manifest, Role, Variant
from mmedge.bundle.nodes import NodeEntry, NodeTable, load_nodes, save_nodes
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.bundle.verifying import verify_files

__all__ = [
    "Bundle",
    "Golden",
    "Manifest",
    "NodeEntry",
    "NodeTable",
    "Role",
    "Variant",
    "create_bundle",
    "describe_files",
    "load_golden",
    "load_nodes",
    "open_bundle",
    "save_golden",
    "save_nodes",
    "verify_files",
    "write_manifest",
]
