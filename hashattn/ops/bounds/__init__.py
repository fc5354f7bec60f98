"""Bounds of pages: what the keys of a page can have at most of a product, from the extremes of its channels."""
