"""Encoders that were fitted: saving, loading, and those that come with the library."""
