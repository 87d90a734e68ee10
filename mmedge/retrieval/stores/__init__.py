"""Stores beyond the device: databases that follow the VectorStore contract."""
