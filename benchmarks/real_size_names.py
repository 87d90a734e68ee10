"""Names of what encoders_real_size.py measures."""

from __future__ import annotations

__all__ = ["ROLES", "SUBJECTS"]

SUBJECTS = {
    "eva02-clip-b16": "EVA-02-CLIP B/16",
    "siglip-b16": "SigLIP B/16",
    "clip-b32": "CLIP ViT-B/32",
    "clip-b16": "CLIP ViT-B/16",
    "dinov2-base": "DINOv2 base",
    "resnet-50": "ResNet-50",
    "clap": "CLAP (HTSAT)",
    "owlv2-base": "OWLv2 base, 960 x 960",
}
"""Names of the encoders, by key."""
ROLES = {"clap": "audio_encoder"}
"""Role that is measured; the others' is the image encoder."""
