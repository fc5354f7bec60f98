"""The demo: a small model, a long text, one fact to find in it."""
