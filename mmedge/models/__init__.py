"""What a user holds: models made of sessions, preprocessing and heads."""

from mmedge.models.batches import BadImage
from mmedge.models.classification import Classification, ScoredLabel
from mmedge.models.dual_encoder import DualEncoder, EncodedFiles
from mmedge.sessions.verification import RoleVerification, verify_bundle

__all__ = [
    "BadImage",
    "Classification",
    "DualEncoder",
    "EncodedFiles",
    "RoleVerification",
    "ScoredLabel",
    "verify_bundle",
]
