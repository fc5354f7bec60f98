"""Where attention by hash index meets other libraries. Each module imports its ecosystem when it is imported itself."""
