"""Model sources: reading a folder or a hub repository safely."""
