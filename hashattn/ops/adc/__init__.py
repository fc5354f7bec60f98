"""Asymmetric distance computation: distances of byte codes, looked up in a table of each query."""
