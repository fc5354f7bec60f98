"""What compositions keep of a model's attention and of its answers: recall, mass, perplexity, retrieval."""
