"""Exporting graphs and running them in a worker."""
