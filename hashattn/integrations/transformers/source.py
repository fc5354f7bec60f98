"""How an attention module calls transformers' attention function, as its source says."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from transformers import AttentionInterface, PreTrainedModel

# what an attention function may be given and needs no part in the softmax, or is looked at in each call
POSITIONAL = ("module", "query", "key", "value", "attention_mask")
KNOWN = {*POSITIONAL, "dropout", "scaling", "is_causal", "sliding_window", "position_ids", "output_attentions"}
ASSIGNMENTS = ast.Assign | ast.AugAssign | ast.AnnAssign


@dataclass(frozen=True)
class Source:
    """What the source of an attention module's class says.

    Attributes:
        calls: how often it calls the attention function in a pass.
        cached: whether it updates a cache.
        passes_on: whether the call passes on what the module was given beside its named arguments.
        own_keys: whether the function is given the keys and values as the cache returned them.
        own_number: whether the cache's layer has the module's number.
        own_mask: whether a method of the module makes the mask.
        given: keywords of the call beyond those that are known, and the attribute of the module that each is; "" where
            it is something else.
    """

    calls: int
    cached: bool
    passes_on: bool
    own_keys: bool
    own_number: bool
    own_mask: bool
    given: tuple[tuple[str, str], ...]


def calls_interface(kind: type) -> bool:
    """Whether modules of this class call what is registered with transformers' attention interface."""
    return _caller(kind) is not None


def eager_of(kind: type) -> Callable[..., Any] | None:
    """The eager attention function that stands beside a class of attention modules."""
    function = _caller(kind)
    eager = function.__globals__.get("eager_attention_forward") if function is not None else None
    return eager if callable(eager) else None


def source_of(kind: type) -> Source | None:
    """What the source of a class of attention modules says; None where it cannot be read."""
    return _read(kind)


@functools.cache
def _read(kind: type) -> Source | None:
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
    written = [(n.lineno, t) for n in nodes if isinstance(n, ASSIGNMENTS) for t in _targets(n)]
    masks = _names(arguments.get("attention_mask")) - {"self"}
    return Source(
        calls=len(calls),
        cached=bool(updates),
        passes_on=any(k.arg is None for k in call.keywords),
        own_keys=len(kept) == len(updates) and all(_as_returned(arguments, n, written) for n in kept),
        own_number=all(ast.unparse(n.args[2]) == "self.layer_idx" for n in updates),
        own_mask=any(_targets(n) & masks and _calls_self(n) for n in nodes if isinstance(n, ASSIGNMENTS)),
        given=tuple((k, _attribute(v)) for k, v in arguments.items() if k not in KNOWN),
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


def _as_returned(arguments: dict[str, ast.expr], update: ast.Assign, written: list[tuple[int, str]]) -> bool:
    """Whether key and value are what update() returned, in this order, and are not assigned to later."""
    targets = update.targets[0]
    if not isinstance(targets, ast.Tuple) or len(targets.elts) != 2:
        return False
    for name, target in zip(("key", "value"), targets.elts, strict=True):
        argument = arguments.get(name)
        if not (isinstance(argument, ast.Name) and isinstance(target, ast.Name) and argument.id == target.id):
            return False
        if any(line > update.lineno and t == argument.id for line, t in written):
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
