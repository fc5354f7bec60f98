"""Attached: what attaching put into a model, and takes out again. It lies on the model, so that no handle is needed."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.configs import OwnConfigs
from hashattn.integrations.transformers.forward import HASHATTN_CALL, Call, Forward, hashed_attention

NAME, PLACE = "hashattn", "_hashattn_attached"
CACHES = ("past_key_values", "cache", "layer_past")  # "cache" since transformers 5.24; before, a paged one


@dataclass(frozen=True)
class Arguments:
    """What a module is called with, by name.

    Attributes:
        places: of its arguments.
    """

    places: dict[str, int]

    @classmethod
    def of(cls, module: nn.Module) -> Arguments:
        """Those of a module's forward()."""
        return cls({name: i for i, name in enumerate(inspect.signature(module.forward).parameters)})

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> Any:
        """The first of these that was given; None if none was."""
        for name in names:
            place = self.places.get(name, len(args))
            value = args[place] if place < len(args) else kwargs.get(name)
            if value is not None:
                return value
        return None


@dataclass
class Hook:
    """The hooks of one attention module. A copy of the model has hooks of its own.

    Attributes:
        number: of the layer.
    """

    forward: Forward
    number: int
    arguments: Arguments

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Hand the layer's cache on to the attention function."""
        cache = self.arguments.find(args, kwargs, *CACHES)
        hidden = self.arguments.find(args, kwargs, "hidden_states")
        if hidden is None:
            hidden = args[0]
        config: Any = module.config
        if config._attn_implementation_internal != NAME:
            self.forward.switched(self.number, config._attn_implementation_internal)
            return args, kwargs
        stepping = self.forward.stepping(self.number, cache, hidden.shape[1])
        if stepping is False:
            mask = self.arguments.find(args, kwargs, "attention_mask")
            kwargs[HASHATTN_CALL] = self.forward.prepare(self.number, cache, hidden, mask)
        elif stepping is not True:
            kwargs[HASHATTN_CALL] = stepping
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notice where the module never called the attention function."""
        call = kwargs.get(HASHATTN_CALL)
        if isinstance(call, Call) and not call.reached:
            self.forward.unreached(call)


@dataclass
class Trunk:
    """The hooks of the module that runs the layers: a pass begins and ends with each call of it, errors included."""

    forward: Forward
    arguments: Arguments

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass."""
        cache, tokens = self._given(args, kwargs)
        if tokens is not None and not self.forward.steps(cache, tokens.shape[1]):
            mask = self.arguments.find(args, kwargs, "attention_mask")
            self.forward.open(module, cache, mask, *tokens.shape[:2])

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End it."""
        cache, tokens = self._given(args, kwargs)
        if tokens is not None and not self.forward.steps(cache, tokens.shape[1]):
            self.forward.close(sys.exception() if output is None else None)  # there is none without an error

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The cache, and the tokens, or what they have become where the layers are run by a part of the model."""
        cache = self.arguments.find(args, kwargs, *CACHES)
        return cache, self.arguments.find(args, kwargs, "input_ids", "inputs_embeds", "hidden_states")


@dataclass
class Outputs:
    """The hook of a model: what it cannot put out is refused before any layer has run."""

    forward: Forward

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse output_attentions."""
        asked, config = kwargs.get("output_attentions"), module.config
        if asked is None:
            asked = getattr(config, "output_attentions", False)
        if asked and self.forward.strict:
            raise ValueError(
                "output_attentions=True cannot be served: what searches has no matrix of weights. Detach first, or "
                "attach with strict=False to run such calls densely"
            )


@dataclass
class Attached:
    """A model's hooks and the configs that it has meanwhile. It refers to parts of the model, not to the model."""

    forward: Forward
    modules: dict[int, nn.Module]
    configs: OwnConfigs = field(default_factory=OwnConfigs)
    hooks: list[Any] = field(default_factory=list)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()  # a model that was pickled while attached may be read where nobody attached yet

    def install(self, model: PreTrainedModel) -> None:
        """Put the model to work with what serves its layers."""
        register()
        self.configs.install(model, self.modules, NAME)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and any(m is own for m in module.modules() for own in self._first()):
                self.hooks.append(module.register_forward_pre_hook(Outputs(self.forward).before, with_kwargs=True))
        runs = support.trunk(model, self.modules)
        around = Trunk(self.forward, Arguments.of(runs))
        self.hooks.append(runs.register_forward_pre_hook(around.before, with_kwargs=True))
        self.hooks.append(runs.register_forward_hook(around.after, with_kwargs=True, always_call=True))
        for number, module in self.modules.items():
            hook = Hook(self.forward, number, Arguments.of(module))
            self.hooks.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(hook.after, with_kwargs=True))
        vars(model)[PLACE] = self

    def remove(self, model: nn.Module) -> None:
        """Give the model back as it was."""
        self.forward.disarm()
        for hook in self.hooks:
            hook.remove()
        self.configs.restore()
        self.hooks = []
        vars(model).pop(PLACE, None)

    def _first(self) -> list[nn.Module]:
        return list(self.modules.values())[:1]


def register() -> None:
    """Make the attention function known to transformers."""
    AttentionInterface.register(NAME, hashed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it masks are None and left-padded rows go wrong


def is_attached(model: nn.Module) -> bool:
    """Whether something is attached to the model, to a part of it or to what it is a part of."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), Hook) for hook in hooks)


def detach(model: nn.Module) -> None:
    """Give an attached model back exactly as it was, without its handle. See :meth:`Handle.detach`.

    Raises:
        ValueError: nothing is attached to the model.
    """
    kind = type(model).__name__
    if isinstance(model, nn.Module) and PLACE in vars(model):
        vars(model)[PLACE].remove(model)
        return
    if not isinstance(model, nn.Module) or not is_attached(model):
        raise ValueError(f"nothing is attached to this {kind}")
    inner = [name for name, module in model.named_modules() if PLACE in vars(module)]
    where = f"its part {inner[0]!r}" if inner else "the model that it is a part of"
    raise ValueError(f"nothing is attached to this {kind} itself: detach {where}")
