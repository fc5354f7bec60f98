"""lasting: what is made once and kept serves training too, whatever mode it is made in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


def lasting(make: Callable[Given, Made]) -> Callable[Given, Made]:
    """Run a function that makes tensors to keep outside of torch.inference_mode(), without gradients.

    A tensor made in inference mode can never be saved for a backward pass, nor be written to outside of it.
    """

    @functools.wraps(make)
    def made(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # traced code makes nothing to keep
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return made
