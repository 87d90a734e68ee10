"""Token generation with a stateful session."""

from mmedge.generation.loop import LogitsHook, generate, pad_left

__all__ = ["LogitsHook", "generate", "pad_left"]
