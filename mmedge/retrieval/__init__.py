"""Search on the device: an index of embeddings with their ids, times, sources and metadata."""
