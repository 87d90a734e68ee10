"""Making, measuring and describing variants."""
