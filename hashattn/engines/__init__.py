"""Which engine serves a step, and how: dense, reference, cpu and gpu, and the one choice between them."""
