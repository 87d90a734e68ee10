"""Generation of tokens by a session with a state."""

from mmedge.generation.loop import LogitsHook, generate, pad_left

__all__ = ["LogitsHook", "generate", "pad_left"]
