"""The decode step in CUDA C++, compiled when it is first needed: faster than Triton's, for the GPUs that it serves."""
