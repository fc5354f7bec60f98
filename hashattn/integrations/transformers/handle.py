"""Handle: a composition at work in a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.attention import HashAttention
from hashattn.integrations.attached.report import LayerRecord, Report, summarise
from hashattn.integrations.attached.update import revised
from hashattn.integrations.transformers import support
from hashattn.integrations.transformers.attached import Attached
from hashattn.integrations.transformers.heads import devices_of
from hashattn.integrations.transformers.layers import Served, check_facts, numbers, serve


@dataclass
class Handle:
    """A composition at work in a model, until detach(). Also a context manager.

    Made by attn.attach(model); see :func:`attach`.

    Attributes:
        attn: the composition of all layers that were not given one of their own.
        model: the attached model.
        refused: why the model was left as it is (only without strict).
    """

    attn: HashAttention
    model: nn.Module
    refused: tuple[str, ...]
    _attached: Attached | None  # None where the model was left as it is

    def update(self, *, layers: Iterable[int] | None = None, **changes: Any) -> None:
        """Change compositions while attached; the next call uses them. If anything is refused, nothing has changed.

        Caches stay as they are, unless encoder, index or norms change: then they are encoded anew at their next use.
        Parts with weights keep them.

        Args:
            layers: which layers; negative numbers count from the last. All that are served by default.
            changes: parts by name (encoder, index, selector, attend, engine, dense_layers), or what
                :meth:`Selector.revised` takes: k or share for the whole budget, forced keys and samples included;
                min_k, t1, t2, radius, limit, per, combine and the like; sinks and recent for the forced keys.

        Raises:
            TypeError: a name that is neither part nor field; the nearest known one is named.
            ValueError: a value that its part refuses, parts that do not fit the model, a layer that is not served.
            RuntimeError: the handle is detached.
        """
        attached = self._attached
        if attached is None:
            self.attn = revised(self.attn, changes)
            return
        if not attached.hooks:
            raise RuntimeError("this handle is detached: attach the composition again")
        forward, modules = attached.forward, attached.modules
        served, depth = forward.served, support.depth_of(self.model, modules)
        chosen = list(served) if layers is None else numbers("layers", layers, modules, depth)
        if layers is not None and "dense_layers" in changes:
            raise ValueError('dense_layers is for all layers; with layers=, engine="dense" makes single ones dense')
        for i in chosen:
            if layers is not None and served[i].attn is None:
                raise ValueError(f"layers names layer {i}, which is not served: {served[i].dense}")
        attn = revised(self.attn, changes) if layers is None else self.attn
        new = dict(served)
        for i in chosen:
            composition = _revised_layer(served[i], i, changes)
            check_facts(composition, self.model)
            new[i] = serve(composition, served[i].own, modules[i], i, depth)
        for one in new.values():
            one.composition.to(forward.device or devices_of(modules)[0])
        self.attn, forward.served = attn, new
        forward.rearm()

    def report(self) -> Report:
        """What ran so far, per layer: sparse, dense by choice, dense because; keys and bytes read; engine and why."""
        if self._attached is None:
            return summarise({}, self.refused)
        forward = self._attached.forward
        with forward.ledger.guard:
            forward.ledger.look()
            return summarise(forward.records, self.refused)

    def reads(self) -> Tensor:
        """How often each position was read by one-token calls: int64 [layers, positions]. Needs trace=True."""
        if self._attached is None or not self._attached.forward.trace:
            raise RuntimeError("reads are counted with attach(model, trace=True) only, in models that are served")
        rows = [r.reads for r in self._attached.forward.records.values()]
        width = max((len(r) for r in rows if r is not None), default=0)
        table = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            if row is not None:
                table[i, : len(row)] = row.cpu()
        return table

    def reset_report(self) -> None:
        """Start counting anew."""
        if self._attached is None:
            return
        forward = self._attached.forward
        with forward.ledger.guard:
            forward.ledger.look()
            for number in forward.records:
                forward.records[number] = LayerRecord()

    def detach(self) -> None:
        """Give the model back exactly as it was, also in the middle of generate(). Calling it again does nothing.

        Caches made meanwhile stay usable: without the hooks they are attended to in full.
        """
        if self._attached is not None and self._attached.hooks:
            self._attached.remove(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def _revised_layer(served: Served, number: int, changes: dict[str, Any]) -> HashAttention:
    try:
        return revised(served.composition, changes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {number}: {error}") from None
