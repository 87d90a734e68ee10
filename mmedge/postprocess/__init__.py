"""From a detector's outputs to boxes: scores, overlap, suppression. numpy alone."""

__all__: list[str] = []
