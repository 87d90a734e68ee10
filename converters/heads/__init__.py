"""Heads: what a module reads of encoders, and the heads that mmedge brings."""

from mmedge.converters.heads.base import HeadSpec, SensorInput, TapInput

__all__ = ["HeadSpec", "SensorInput", "TapInput"]
