"""The inner loops. Each op has a reference in plain PyTorch, which is its specification, and may have faster twins."""
