"""Triton's interpreter, where a version of it needs help."""

from importlib.metadata import PackageNotFoundError, version


def ranges_take_tensors() -> None:
    """Let kernels loop up to a tensor under Triton 3.6, whose interpreter takes int() of an array of one element.

    NumPy deprecated that, and refuses it from 2.4 on; Triton 3.7 does without. Compiled kernels have no such step.
    """
    try:
        old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    except PackageNotFoundError:
        return
    if not old:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
