"""Lossless generation: search drafts tokens, full attention checks them, and what is written is full attention's."""
