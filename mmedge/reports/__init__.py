"""HTML reports. They read results and never measure."""
