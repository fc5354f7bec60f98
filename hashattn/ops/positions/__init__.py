"""Keys that are kept for their position: no scores, no scan."""
