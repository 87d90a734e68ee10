"""`mmedge serve`: local pages and HTTP APIs for what mmedge makes."""
