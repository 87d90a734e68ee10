"""What a user holds: models made of sessions, preprocessing and heads."""

from mmedge.models.batches import Skipped
from mmedge.models.classification import Classification, ScoredLabel
from mmedge.models.dual_encoder import DualEncoder, EncodedFiles
from mmedge.sessions.verification import RoleVerification, verify_bundle

__all__ = [
    "Classification",
    "DualEncoder",
    "EncodedFiles",
    "RoleVerification",
    "ScoredLabel",
    "Skipped",
    "verify_bundle",
]
