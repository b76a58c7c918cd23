"""One file a way to search."""
