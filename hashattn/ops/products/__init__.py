"""Inner products with vectors: whole keys, their principal components or a few of their channels."""
