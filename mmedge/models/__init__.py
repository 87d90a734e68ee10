"""Models: sessions, preprocessing and heads behind one user-facing class per kind."""

from mmedge.models.batches import EncodedFiles, Skipped
from mmedge.models.classification import Classification, ScoredLabel
from mmedge.models.detector import Detections, Detector
from mmedge.models.dual_encoder import DualEncoder
from mmedge.models.encoder import Encoder
from mmedge.sessions.verification import RoleVerification, verify_bundle

__all__ = [
    "Classification",
    "Detections",
    "Detector",
    "DualEncoder",
    "EncodedFiles",
    "Encoder",
    "RoleVerification",
    "ScoredLabel",
    "Skipped",
    "verify_bundle",
]
