"""What an attention module says of itself: heads, device, dtype; in its source, how it calls the attention function."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

# what the models of transformers call them; a module's own come before its config's
Q_HEADS = ("num_heads", "num_attention_heads", "num_q_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_k_heads", "n_kv_heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")
KEYS, VALUES = ("k_proj", "key", "Wk"), ("v_proj", "value", "Wv")

# what an attention function may be given and needs no part in the softmax, or is looked at in each call
POSITIONAL = ("module", "query", "key", "value", "attention_mask")
KNOWN = {*POSITIONAL, "dropout", "scaling", "is_causal", "sliding_window", "position_ids", "output_attentions"}
ASSIGNMENTS = ast.Assign | ast.AugAssign | ast.AnnAssign


def layer_config(module: nn.Module) -> Any:
    """The config of a module's layer: its own where the layers of a model differ."""
    config: Any = module.config
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[module.layer_idx]
    return config


def heads(module: nn.Module) -> tuple[int, int, int]:
    """(q_heads, kv_heads, head_dim) of an attention module.

    Raises:
        ValueError: neither the module nor its config says them, or keys and values differ in size.
    """
    config = layer_config(module)
    q_heads = _number(module, Q_HEADS) or _number(config, ("num_attention_heads",))
    if q_heads is None:
        raise ValueError("neither the module nor its config says how many heads it has")
    width, own = _number(config, ("hidden_size",)), _number(module, HEAD_DIM) or _number(config, ("head_dim",))
    head_dim = own if own is not None else width // q_heads if width is not None else None
    if head_dim is None:
        raise ValueError("neither the module nor its config says the size of its heads")
    keys, values = _outputs(module, KEYS), _outputs(module, VALUES)
    value_dim = _number(module, ("v_head_dim",)) or (head_dim if keys is None or keys == values else None)
    if value_dim not in (None, head_dim) or (value_dim is None and values is not None):
        raise ValueError(f"its keys have {keys or head_dim} dimensions, its values {values or value_dim}")
    if keys is not None and keys % head_dim == 0:
        return q_heads, keys // head_dim, head_dim
    groups = _number(module, ("num_key_value_groups",))
    kv_heads = _number(module, KV_HEADS) or (q_heads // groups if groups else None)
    return q_heads, kv_heads or _number(config, KV_HEADS) or q_heads, head_dim


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive number."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return int(value)
    return None


def _outputs(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """How many features a projection of the module has; None without one that says so."""
    for name in names:
        features = getattr(getattr(module, name, None), "out_features", None)
        if isinstance(features, int):
            return features
    return None


def devices_of(modules: dict[int, nn.Module]) -> list[torch.device]:
    """Where the attention weights are, without meta (weights offloaded by layer) if they are elsewhere too.

    Packed and int8 weights are buffers. Modules without either say nothing: the CPU then.
    """
    tensors = (t for m in modules.values() for t in (list(m.parameters()) or m.buffers()))
    devices = list(dict.fromkeys(t.device for t in tensors))
    return [d for d in devices if d.type != "meta"] or devices or [torch.device("cpu")]


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the type of its weights, or what its config says where they are packed."""
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(t.is_floating_point() and t.element_size() > 1 for t in tensors):
        return tensors[0].dtype
    said = getattr(module.config, "dtype", None)
    return said if isinstance(said, torch.dtype) else torch.get_default_dtype()


@dataclass(frozen=True)
class AttentionSource:
    """What the source of an attention module's class says.

    Attributes:
        calls: how often it calls the attention function in a pass.
        cached: whether it updates a cache.
        passes_on: whether the call passes on what the module was given beside its named arguments.
        own_keys: whether the function is given the keys and values as the cache returned them.
        own_number: whether the cache's layer has the module's number.
        own_mask: whether a method of the module makes the mask.
        keywords: of the call beyond those that are known, and the attribute of the module that each is; "" where it is
            something else.
    """

    calls: int
    cached: bool
    passes_on: bool
    own_keys: bool
    own_number: bool
    own_mask: bool
    keywords: tuple[tuple[str, str], ...]


def calls_interface(kind: type) -> bool:
    """Whether modules of this class call what is registered with transformers' attention interface."""
    return _caller(kind) is not None


def eager_of(kind: type) -> Callable[..., Any] | None:
    """The eager attention function that stands beside a class of attention modules."""
    function = _caller(kind)
    eager = function.__globals__.get("eager_attention_forward") if function is not None else None
    return eager if callable(eager) else None


def source_of(kind: type) -> AttentionSource | None:
    """What the source of a class of attention modules says; None where it cannot be read."""
    return _read(kind)


@functools.cache
def _read(kind: type) -> AttentionSource | None:
    function = _caller(kind)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))) if function is not None else None
    except (OSError, TypeError, SyntaxError):
        return None
    if function is None or tree is None:
        return None
    names = {name for name, value in function.__globals__.items() if isinstance(value, AttentionInterface)}
    nodes = sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.expr | ast.stmt)), key=lambda n: (n.lineno, n.col_offset)
    )
    functions = {t for n in nodes if isinstance(n, ASSIGNMENTS) and names & _names(n.value) for t in _targets(n)}
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in functions]
    updates = [n for n in nodes if _is_update(n)]
    kept = [n for n in nodes if isinstance(n, ast.Assign) and n.value in updates]  # as they are returned
    if not calls:
        return None
    call = calls[0]
    arguments = dict(zip(POSITIONAL, call.args, strict=False))
    arguments |= {k.arg: k.value for k in call.keywords if k.arg is not None}
    assigned = [(n.lineno, t) for n in nodes if isinstance(n, ASSIGNMENTS) for t in _targets(n)]
    masks = _names(arguments.get("attention_mask")) - {"self"}
    return AttentionSource(
        calls=len(calls),
        cached=bool(updates),
        passes_on=any(k.arg is None for k in call.keywords),
        own_keys=len(kept) == len(updates) and all(_as_returned(arguments, n, assigned) for n in kept),
        own_number=all(ast.unparse(n.args[2]) == "self.layer_idx" for n in updates),
        own_mask=any(_targets(n) & masks and _calls_self(n) for n in nodes if isinstance(n, ASSIGNMENTS)),
        keywords=tuple((k, _attribute(v)) for k, v in arguments.items() if k not in KNOWN),
    )


@functools.cache
def _caller(kind: type) -> Callable[..., Any] | None:
    """The method that uses the attention interface."""
    if issubclass(kind, PreTrainedModel):  # they choose the function, their attention modules call it
        return None
    for base in kind.__mro__:
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else None
            if inspect.isfunction(function) and any(
                isinstance(function.__globals__.get(name), AttentionInterface) for name in function.__code__.co_names
            ):
                return function
    return None


def _is_update(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a node is cache.update(keys, values, layer, ...)."""
    method = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(node, ast.Call)
        and isinstance(method, ast.Attribute)
        and method.attr == "update"
        and len(node.args) > 2
    )


def _as_returned(arguments: dict[str, ast.expr], update: ast.Assign, assigned: list[tuple[int, str]]) -> bool:
    """Whether key and value are what update() returned, in this order, and are not assigned to later."""
    targets = update.targets[0]
    if not isinstance(targets, ast.Tuple) or len(targets.elts) != 2:
        return False
    for name, target in zip(("key", "value"), targets.elts, strict=True):
        argument = arguments.get(name)
        if not (isinstance(argument, ast.Name) and isinstance(target, ast.Name) and argument.id == target.id):
            return False
        if any(line > update.lineno and t == argument.id for line, t in assigned):
            return False
    return True


def _attribute(value: ast.expr) -> str:
    """ "a.b" of self.a.b; "" of any other expression."""
    text = ast.unparse(value)
    plain = isinstance(value, ast.Attribute) and text.startswith("self.") and "(" not in text
    return text.removeprefix("self.") if plain else ""


def _calls_self(node: ast.AST) -> bool:
    """Whether a method of self is called in it."""
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return any(ast.unparse(function).startswith("self.") for function in calls)


def _names(node: ast.expr | None) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node is not None else set()


def _targets(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
