"""ModelState: what a graph takes of a model as it finds it, and what keeps a model from being captured."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import getitem, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from hashattn.integrations.transformers.forward import Forward

EVERYWHERE: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
TRAINING = itemgetter("training")
IDLE = "transformers.utils.output_capturing"  # hooks that do nothing unless more outputs are asked for


class ModelState:
    """The modules, where their weights lie, their hooks and modes. A graph serves a model that still has all of them.

    Args:
        stack: the module that is captured.
    """

    def __init__(self, stack: nn.Module) -> None:
        modules = [*stack.modules()]
        self._attributes = [vars(module) for module in modules]
        dicts = [held for m in modules for held in (m._modules, m._parameters, m._buffers)]
        hooks = [held for m in modules for held in (m._forward_pre_hooks, m._forward_hooks)]
        self._sized = [*EVERYWHERE, *self._attributes, *dicts, *hooks]
        places = [(held, name) for held in dicts for name in held]
        self._dicts, self._names = [held for held, _ in places], [name for _, name in places]
        self._parts = [*map(getitem, self._dicts, self._names)]
        self._tensors = [x for x in self._parts if isinstance(x, Tensor)]
        self._seen = self._look()

    def same(self) -> bool:
        """Whether the model is as it was. Asked at every step: no loop of it is Python's."""
        if self._look() != self._seen:
            return False
        try:
            return all(map(is_, map(getitem, self._dicts, self._names), self._parts))
        except KeyError:
            return False

    def _look(self) -> tuple[list[int], ...]:
        places, modes = map(Tensor.data_ptr, self._tensors), map(TRAINING, self._attributes)
        return [*map(len, self._sized)], [*places], [*modes]


def why_not_capture(stack: nn.Module, ours: tuple[type, ...]) -> str | None:
    """Why a module cannot be captured, as far as it says itself.

    Args:
        ours: whose hooks do not matter.
    """
    if stack.training:
        return "the model is in training mode: call model.eval()"
    if any(EVERYWHERE):
        return "all modules have hooks (torch.nn.modules.module.register_module_forward_hook)"
    for name, module in stack.named_modules():
        where = f"its part {name!r}" if name else "what runs its layers"
        if "_hf_hook" in vars(module):
            return f"{where} has a hook of accelerate: weights may be offloaded"
        if "forward" in vars(module) and not isinstance(vars(module)["forward"], ours):
            return f"{where} has a forward() of its own, which hides the class's"
        if type(module).__module__.split(".")[0] == "peft":
            return f"{where} is an adapter of peft, which may be switched at any time"
        for hook in chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), ours) and getattr(hook, "__module__", "") != IDLE:
                return f"{where} has a hook: {getattr(hook, '__qualname__', type(hook).__name__)}"
    return None


def why_never_captured(
    model: PreTrainedModel, stack: nn.Module, arguments: Mapping[str, int], forward: Forward
) -> str | None:
    """Why no call of an attached model can be captured; None if some may be.

    Args:
        stack: what runs its layers.
        arguments: of the stack.
    """
    if forward.options.trace:
        return "trace=True counts what each step reads"
    if forward.options.simulate:
        return "simulate=True searches at every position"
    if forward.device is None:
        return "the model is spread over several devices"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised"
    if "forward" in vars(stack):
        return f"what runs its layers, a {type(stack).__name__}, has a forward() of its own, which hides the class's"
    if "position_ids" not in arguments:
        return f"what runs its layers, a {type(stack).__name__}, is not given positions"
    own = [number for number, served in forward.served.items() if served.attn is None]
    if own:
        return f"layer {own[0]} keeps the model's own cache ({forward.served[own[0]].why_dense}), which the host counts"
    return None
