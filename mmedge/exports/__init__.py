"""Exports of a bundle: for trtexec and C++ nodes, and for Triton Inference Server."""

from mmedge.exports.document import IoDocument
from mmedge.exports.engine_folder import export_engine_folder
from mmedge.exports.selection import Selection, select
from mmedge.exports.triton import export_triton

__all__ = ["IoDocument", "Selection", "export_engine_folder", "export_triton", "select"]
