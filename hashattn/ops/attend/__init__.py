"""Gathering selected keys and values, and attending to them."""

from hashattn.ops.attend.cpu import attend
from hashattn.ops.attend.reference import attend as reference
from hashattn.ops.attend.reference import head_logits, row_numbers, softmax_over

__all__ = ["attend", "head_logits", "reference", "row_numbers", "softmax_over"]
