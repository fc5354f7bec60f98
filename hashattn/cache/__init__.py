"""The cache of keys, values and codes."""
