"""The search for a precision."""
