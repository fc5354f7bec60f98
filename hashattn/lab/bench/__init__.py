"""Benchmarks that check first and measure then: `hashattn bench`."""
