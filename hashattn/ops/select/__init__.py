"""One exact choice over ranks: keys of any family's scores, in the order of the specification, on a GPU.

A family (:mod:`hashattn.ops.select.family`) writes a rank a key; :mod:`hashattn.ops.select.triton` chooses the nearest
of them, and :mod:`hashattn.ops.attend.triton` attends to what was chosen. The specification of the choice is
:func:`hashattn.ops.nearest.reference.nearest`.
"""
