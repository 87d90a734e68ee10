"""Token generation with a stateful session."""

from mmedge.generation.constraint import Constraint
from mmedge.generation.decoding import DecoderInputs, Decoding
from mmedge.generation.logits import LogitsProcessor
from mmedge.generation.options import GenerationOptions
from mmedge.generation.prefix import Prefix
from mmedge.generation.rows import Completion, Finish

__all__ = [
    "Completion",
    "Constraint",
    "DecoderInputs",
    "Decoding",
    "Finish",
    "GenerationOptions",
    "LogitsProcessor",
    "Prefix",
]
