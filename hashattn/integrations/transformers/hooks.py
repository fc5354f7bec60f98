"""Hooks: what attaching puts into a model, and takes out again. They lie on the model, so that no handle is needed."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hashattn.integrations.attached.options import NEVER
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.attention import HASHATTN_CALL, NAME, LayerCall, hashed_attention
from hashattn.integrations.transformers.attention_module import heads
from hashattn.integrations.transformers.forward import Forward
from hashattn.integrations.transformers.graphed_forward import HASHATTN_REPLAY, GraphedForward
from hashattn.integrations.transformers.graphs import Graphs
from hashattn.integrations.transformers.model_state import why_never_captured
from hashattn.integrations.transformers.own_configs import OwnConfigs
from hashattn.integrations.transformers.static_layer import hidden_from_host

PLACE = "_hashattn_attached"
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
class AttentionHooks:
    """The hooks of one attention module. A copy of the model has hooks of its own.

    Attributes:
        number: of the layer.
    """

    forward: Forward
    number: int
    arguments: Arguments

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hand the layer's cache on to the attention function."""
        cache = self.arguments.find(args, kwargs, *CACHES)
        hidden = self.arguments.find(args, kwargs, "hidden_states")
        if hidden is None:
            hidden = args[0]
        config: Any = module.config
        if config._attn_implementation_internal != NAME:
            self.forward.switched(self.number, config._attn_implementation_internal)
            return args, kwargs
        layer = self.forward.graph_layer(self.number, cache, hidden.shape[1])
        if layer is False:
            mask = self.arguments.find(args, kwargs, "attention_mask")
            kwargs[HASHATTN_CALL] = self.forward.prepare(self.number, cache, hidden, mask)
        elif layer is not True:
            kwargs[HASHATTN_CALL] = layer
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notice where the module never called the attention function."""
        call = kwargs.get(HASHATTN_CALL)
        if isinstance(call, LayerCall) and not call.reached:
            self.forward.unreached(call)


@dataclass
class StackHooks:
    """The hooks of the module that runs the layers: a pass begins and ends with each call of it, errors included."""

    forward: Forward
    arguments: Arguments
    graphs: Graphs | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Begin a pass; one that a graph serves is replayed in the place of the module's forward()."""
        if self.graphs is not None and not hidden_from_host():  # nobody captures or traces the call
            replay = self.graphs.take(module, args, kwargs)
            if replay is not None:
                return args, {**kwargs, HASHATTN_REPLAY: replay}
        cache, tokens = self._cache_and_tokens(args, kwargs)
        if tokens is not None and not self.forward.in_graph(cache, tokens.shape[1]):
            mask = self.arguments.find(args, kwargs, "attention_mask")
            self.forward.open(module, cache, mask, *tokens.shape[:2])
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End it."""
        cache, tokens = self._cache_and_tokens(args, kwargs)
        if tokens is not None and not self.forward.in_graph(cache, tokens.shape[1]):
            self.forward.close(sys.exception() if output is None else None)  # there is none without an error

    def _cache_and_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The cache, and the tokens, or what they have become where the layers are run by a part of the model."""
        cache = self.arguments.find(args, kwargs, *CACHES)
        return cache, self.arguments.find(args, kwargs, "input_ids", "inputs_embeds", "hidden_states")


@dataclass
class OutputHook:
    """The hook of a model: what it cannot put out is refused before any layer has run."""

    forward: Forward

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse output_attentions."""
        asked, config = kwargs.get("output_attentions"), module.config
        if asked is None:
            asked = getattr(config, "output_attentions", False)
        if asked and self.forward.options.strict:
            raise ValueError(
                "output_attentions=True cannot be served: what searches has no matrix of weights. Detach first, or "
                "attach with strict=False to run such calls densely"
            )


@dataclass
class Hooks:
    """A model's hooks and the configs that it has meanwhile. It refers to parts of the model, not to the model."""

    forward: Forward
    modules: dict[int, nn.Module]
    configs: OwnConfigs = field(default_factory=OwnConfigs)
    graphs: Graphs | None = None
    handles: list[Any] = field(default_factory=list)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()  # a model that was pickled while attached may be read where nobody attached yet

    def install(self, model: PreTrainedModel) -> None:
        """Put the model to work with what serves its layers."""
        register()
        self.configs.install(model, self.modules, NAME)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and any(m is own for m in module.modules() for own in self._first()):
                self.handles.append(module.register_forward_pre_hook(OutputHook(self.forward).before, with_kwargs=True))
        stack = support.layer_stack(model, self.modules)
        around = StackHooks(self.forward, Arguments.of(stack), self._make_graphs(model, stack))
        self.handles.append(stack.register_forward_pre_hook(around.before, with_kwargs=True))
        self.handles.append(stack.register_forward_hook(around.after, with_kwargs=True, always_call=True))
        for number, module in self.modules.items():
            hook = AttentionHooks(self.forward, number, Arguments.of(module))
            self.handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(hook.after, with_kwargs=True))
        vars(model)[PLACE] = self

    def _make_graphs(self, model: PreTrainedModel, stack: nn.Module) -> Graphs | None:
        """Let replays stand in for what runs the layers, if that is wanted."""
        if self.forward.options.graph == NEVER:
            return None
        arguments, served = Arguments.of(stack), self.forward.served
        refusal = why_never_captured(model, stack, arguments.places, self.forward)
        q_heads = {i: heads(module)[0] for i, module in self.modules.items() if served[i].attn is not None}
        ours = (AttentionHooks, StackHooks, OutputHook, GraphedForward)
        self.graphs = Graphs(self.forward, q_heads, arguments.places, CACHES, refusal, ours)
        if refusal is None:
            vars(stack)["forward"] = GraphedForward(stack)
        return self.graphs

    def remove(self, model: nn.Module) -> None:
        """Give the model back as it was."""
        self.forward.release()
        for handle in self.handles:
            handle.remove()
        self.configs.restore()
        self.handles = []
        if self.graphs is not None:
            self.graphs.clear()
            stack = support.layer_stack(model, self.modules)
            if isinstance(vars(stack).get("forward"), GraphedForward):
                del vars(stack)["forward"]
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
    return any(isinstance(getattr(hook, "__self__", None), AttentionHooks) for hook in hooks)


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
