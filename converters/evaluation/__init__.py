"""Fidelity of variants: metrics, intervals and neighbours."""
