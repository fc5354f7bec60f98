"""Graphs: one-token calls of an attached model replay a graph of it, where nothing forbids that."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import nn
from transformers import Cache

from hashattn.core.guard import Guard
from hashattn.integrations.attached.graph_capture import CAPTURES, CannotCapture
from hashattn.integrations.attached.options import ALWAYS
from hashattn.integrations.attached.passes import Pass
from hashattn.integrations.attached.report import GraphUse
from hashattn.integrations.transformers import caches
from hashattn.integrations.transformers.attention import NAME, set_starts
from hashattn.integrations.transformers.cache_layer import HashedLayer
from hashattn.integrations.transformers.forward import Forward
from hashattn.integrations.transformers.model_graph import ModelGraph, capture_step
from hashattn.integrations.transformers.model_state import why_not_capture
from hashattn.integrations.transformers.replay import CacheGraphs, Done, GraphCounts, Replay
from hashattn.integrations.transformers.static_layer import HashedStaticLayer
from hashattn.integrations.transformers.step_call import POSITIONS, StepCall
from hashattn.integrations.transformers.step_run import run_step

FIRST = "the first of its kind in a cache, which does not wait for a capture"


class Graphs:
    """The graphs of an attached model: one for each cache and kind of call, gone with its cache.

    Args:
        forward: what its hooks share.
        q_heads: of its layers, by number.
        places: of the arguments of what runs its layers.
        refusal: why nothing of it can be captured; None if something may be.
        ours: whose hooks and forward() do not matter.
    """

    def __init__(
        self,
        forward: Forward,
        q_heads: dict[int, int],
        places: Mapping[str, int],
        names: tuple[str, ...],
        refusal: str | None,
        ours: tuple[type, ...],
    ) -> None:
        self.forward, self.q_heads, self.places, self.names = forward, q_heads, dict(places), names
        self.refusal, self.ours = refusal, ours
        self.guard = Guard()
        self.counts = GraphCounts()
        self._refused: dict[Any, str] = {}
        self._watched: set[Any] = set()  # kinds of calls that were found to wait for nobody
        self._caches: weakref.WeakKeyDictionary[Cache, CacheGraphs] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Graphs], tuple[Any, ...]]:
        """Copied or pickled, it has captured nothing yet."""
        return Graphs, (self.forward, self.q_heads, self.places, self.names, self.refusal, self.ours)

    def take(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Replay | Done | None:
        """What serves a call of what runs the layers, with a pass begun; None to run it as it is.

        Raises:
            ValueError: a step that has no graph, with graph="always". A pass is begun.
            RuntimeError: another thread uses the cache. A pass is begun.
        """
        device = self.forward.device
        if device is not None and device.type not in CAPTURES and self.forward.options.graph != ALWAYS:
            return None  # where there are no graphs
        call = replace(StepCall.of(self.places, self.names, args, kwargs), why_dense=self.forward.passes.why_dense)
        if not self._is_step(stack, call):
            return None
        passes, one = self.forward.passes, Pass(self.forward.served)
        passes.open(one)
        passes.claim(one, call.cache, caches.scratch_of(call.cache))
        with self.guard:
            found = self._replay(stack, call)
        if isinstance(found, Replay | Done):
            return found
        if found is not None:
            with self.guard:
                self.counts.eager[found] += 1
            if self.forward.options.graph == ALWAYS:
                raise ValueError(f'graph="{ALWAYS}", but this call cannot be replayed from a graph: {found}')
        passes.close()
        return None

    def take_back(self, cache: Cache, columns: int) -> bool:
        """Let a cache forget its last columns, if replays alone appended them; returns whether that was done."""
        with self.guard:
            held = self._caches.get(cache)
            if held is None or not held.sure or not all(map(is_, held.layers, cache.layers)):
                return False
            if len(held.layers) != len(cache.layers) or not all(x.on_device.can_rewind(columns) for x in held.layers):
                return False
            for layer in held.layers if columns else ():
                assert layer.kv is not None
                layer.on_device.rewind(layer.kv, columns)
            return True

    def begin_at(self, cache: Cache, starts: list[int], earlier: bool) -> None:
        """Go on with a cache whose rows begin at other columns now, which may be earlier ones."""
        with self.guard:
            held = self._caches.get(cache)
            for key, graph in [*held.by_call.items()] if held is not None else []:
                if earlier and graph.turns and held is not None:
                    del held.by_call[key]  # it would serve beyond where steps turn to searching
                else:
                    graph.begin_at(starts)

    def clear(self) -> None:
        """Let go of all graphs."""
        with self.guard:
            self._caches.clear()
            self._refused.clear()
            self._watched.clear()

    def reset(self) -> None:
        """Count anew."""
        with self.guard:
            self.counts = GraphCounts()

    def use(self) -> GraphUse:
        """What they were used for, and the memory that they take."""
        with self.guard:
            nbytes = sum(graph.nbytes for held in self._caches.values() for graph in held.by_call.values())
            counts = self.counts
            return GraphUse(counts.replayed, counts.captured, nbytes, counts.largest, dict(counts.eager))

    # ---- inside

    def _is_step(self, stack: nn.Module, call: StepCall) -> bool:
        """Whether it is a step of decoding, in a model that is what it was attached as."""
        options = self.forward.options
        most = options.max_sparse_q if call.why_dense is None else options.drafted + 1
        if call.shape is None or not isinstance(call.cache, Cache) or call.shape[1] > most:
            return False
        config, first = getattr(stack, "config", None), min(self.q_heads)
        layers, device = caches.layers_of(call.cache), next(iter(call.changing.values())).device
        if self.forward.device not in (None, device):  # it was moved, and parts have to follow
            return False
        filled = first < len(layers) and caches.filled_columns(layers[first]) > 0
        return filled and getattr(config, "_attn_implementation_internal", NAME) == NAME

    def _replay(self, stack: nn.Module, call: StepCall) -> Replay | Done | str | None:
        """What serves a call; why there is none; or None where an eager call has to come first."""
        config, device = getattr(stack, "config", None), next(iter(call.changing.values())).device
        if device.type not in CAPTURES:
            return f"the model is on {device.type}, where there are no graphs"
        reason = self.refusal or call.why_not(config) or self._why_not_depth(config)
        held = reason or self._of(call.cache)
        if not isinstance(held, CacheGraphs):
            return held
        layers, filled = held.layers, held.layers[0].filled
        assert call.shape is not None and layers[0].kv is not None
        (batch, tokens), starts = call.shape, layers[0].kv._starts
        if batch != layers[0].kv.batch:
            return None  # which is refused
        if not held.sure:
            held.sure = True
            for layer in layers:
                layer.take_back()
        settled = self._with_positions(call, filled)
        if isinstance(settled, str):
            return settled
        graph = held.by_call.get(settled.key)
        serves = graph is not None and graph.run.serves(layers, filled, tokens)
        if graph is not None and serves and settled.masked_as(graph.seen, starts, filled + tokens):
            return Replay(self.counts, held, graph, layers, settled)
        if any(layer.filled != filled for layer in layers):
            return "the layers of its cache hold different numbers of columns"
        return self._make(stack, settled, held, filled, tokens)

    def _make(
        self, stack: nn.Module, call: StepCall, held: CacheGraphs, filled: int, tokens: int
    ) -> Replay | Done | str | None:
        """Capture a step that has run, or run it; or find the graph that serves once the layers are ready for it."""
        key, layers = call.key, held.layers
        reason = why_not_capture(stack, self.ours) or self._refused.get(key) or held.refused.get(key)
        if reason is not None:
            return reason
        starts, reason = call.rows(filled + tokens)
        reason = reason or self._ready(layers, starts, tokens, call.why_dense is not None)
        if reason is not None:
            return reason
        if filled + tokens > min(layer.on_device.limit for layer in layers):
            return None  # an eager call makes room, or says that there is none
        graph = held.by_call.get(key)
        if graph is None or not graph.run.serves(layers, filled, tokens):
            held.by_call.pop(key, None)  # before there is another
            try:
                found = self._captured(stack, call, held, filled, tokens)
            except torch.OutOfMemoryError as error:
                held.refused[key] = reason = f"there is no memory for its graph: {_line(error)}"
                return reason
            except CannotCapture as error:
                self._refused[key] = str(error)
                return str(error)
            except Exception as error:  # whatever a model's own code makes of it
                if key not in held.runs:  # the call that follows tells; of another cache it may be served
                    held.refused[key] = reason = f"it does not run as it would be captured: {_line(error)}"
                else:
                    self.refusal = reason = f"capturing it failed: {_line(error)}"  # of the whole model: tried once
                return reason
            if isinstance(found, Done):
                return found
            graph = found
        graph.begin_at(starts)
        return Replay(self.counts, held, graph, layers, call)

    def _captured(
        self, stack: nn.Module, call: StepCall, held: CacheGraphs, filled: int, tokens: int
    ) -> ModelGraph | Done:
        """The graph of a step, if one like it has run; else it runs now, and is captured another time if there is one.

        Kernels are compiled, and libraries make what they work in, when they first run: a capture could not. And a
        text's first token comes as soon as it can.
        """
        key, layers, always = call.key, held.layers, self.forward.options.graph == ALWAYS
        run = held.runs.get(key)
        if run is None or not run.serves(layers, filled, tokens):
            held.runs.pop(key, None)
            held.sure = False
            output, run = run_step(stack, call, layers, watched=key not in self._watched)
            self._watched.add(key)
            held.runs[key] = run
            for layer in layers:
                layer.follow_change() if always else layer.lead(tokens, call.why_dense)
            held.sure = True
            if not always:
                self.counts.eager[FIRST] += 1
                return Done(output)
        graph = held.by_call[key] = capture_step(stack, call, layers, run, self.forward.options.drafted > 0)
        self.counts.captured += 1
        self.counts.largest = max(self.counts.largest, graph.nbytes)
        return graph

    def _ready(self, layers: list[HashedLayer], starts: list[int], tokens: int, check: bool) -> str | None:
        """Make the layers ready for steps of so many tokens, dense or not; returns why they cannot be."""
        held = dict(zip(self.q_heads, layers, strict=True))
        numbers = sorted(self.forward.served)  # of the layers that have attention, the model's own among them
        before = dict(zip(numbers[1:], map(held.get, numbers), strict=False))
        for number, layer in held.items():
            served, kv = self.forward.served[number], layer.kv
            assert served.attn is not None and kv is not None
            if starts != kv._starts:
                layer.release()
                set_starts(kv, starts)
            layer.attn = served.attn
            heads = self.q_heads[number]
            counters = self.forward.counters
            reason = layer.serve_graphs(served, number, heads, counters, tokens, before.get(number), check)
            if reason is not None:
                return f"layer {number}: {reason}"
        return None

    def _of(self, cache: Cache) -> CacheGraphs | str | None:
        """What is kept of a cache, whose layers are those that were seen; see :meth:`_layers`."""
        held = self._caches.get(cache)
        if held is not None and held.served is self.forward.served:
            found = map(cache.layers.__getitem__, self.q_heads)
            if len(cache.layers) > max(self.q_heads) and all(map(is_, held.layers, found)):
                return held
        layers = self._layers(cache)
        if not isinstance(layers, list):
            return layers
        held = self._caches[cache] = CacheGraphs(layers, self.forward.served)
        return held

    def _layers(self, cache: Cache) -> list[HashedLayer] | str | None:
        """The cache's layers that are served; why they cannot be; None if an eager call has to take them over first."""
        layers: list[HashedLayer] = []
        if other := [i for i in range(len(cache.layers)) if i not in self.q_heads]:
            return f"layer {other[0]} keeps states of its own in the cache, a {type(cache.layers[other[0]]).__name__}"
        for number in self.q_heads:
            reason, served = caches.why_not_cache(cache, number), self.forward.served[number]
            if reason is not None:
                return reason
            if number >= len(cache.layers):
                return None
            layer = cache.layers[number]
            if not isinstance(layer, HashedLayer) or layer.kv is None or served.attn is None:
                return None
            if type(layer) not in (HashedLayer, HashedStaticLayer):
                return f"layer {number} has a recurrent part, whose states are the host's"
            if not caches.same_codes(layer.attn, served.attn):
                return None
            layers.append(layer)
        return layers

    def _why_not_depth(self, config: Any) -> str | None:
        depth = getattr(config, "num_hidden_layers", None)
        short = isinstance(depth, int) and depth <= max(self.q_heads)
        return f"only {depth} of its layers run" if short else None

    def _with_positions(self, call: StepCall, filled: int) -> StepCall | str:
        """The call with the positions that a model would count itself."""
        if POSITIONS in call.changing:
            return call
        assert call.shape is not None
        (batch, tokens), device = call.shape, next(iter(call.changing.values())).device
        starts, reason = call.rows(filled + tokens)
        if reason is not None or any(starts):
            return reason or "rows are padded, and it is given no position_ids"
        positions = torch.arange(filled, filled + tokens, device=device).expand(batch, -1)
        return replace(call, changing={**call.changing, POSITIONS: positions})


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
