"""What every attend stage promises."""

from __future__ import annotations

import torch
from torch import nn

from hashattn.attend import Attend, merge
from hashattn.attention import HashAttention
from hashattn.core.types import Output, Selection
from hashattn.encoders import Encoder, SimHash
from hashattn.index import FlatHamming, Index
from hashattn.selectors import Selector, TopK
from hashattn.testing.attention import check_attention, filled
from hashattn.testing.inputs import DTYPES, Inputs, Shape, attention64, inputs, visible
from hashattn.testing.promise import check_description, near, promise, reloaded
from hashattn.testing.selector import kept


def check_attend(
    attend: Attend,
    *,
    selector: Selector | None = None,
    encoder: Encoder | None = None,
    index: Index | None = None,
    shape: Shape | None = None,
) -> None:
    """Its output is a softmax over the kept keys: weights sum to one, and make the output; parts merge by their lse.

    Where every slot of a selection is critical and unweighted, logits are exact.

    Args:
        attend: of one layer; fitted if it is to be.
        selector, encoder, index: what it is composed with; TopK(k=20), SimHash(128, centring=None) and FlatHamming() by
            default. Stages that need no selection get none of them.
        shape: of the inputs.

    Raises:
        AssertionError: it breaks a promise.
    """
    promise(isinstance(attend, Attend), attend, "it is a hashattn.Attend")
    shape = shape or Shape()
    check_description(attend)
    promise(isinstance(attend.layer(0), Attend), attend, "layer(i) is an attend stage")
    if not attend.needs_selection:
        attn = HashAttention(attend=attend)
    else:
        coded = encoder or SimHash(128, centring=None), index or FlatHamming()
        attn = HashAttention(*coded, selector or TopK(k=20), attend, engine="reference")
        _check_critical(attn.replace(selector=TopK(k=20)), attend, inputs(shape, attn))
        _check_nothing(attn, attend, inputs(shape, attn))
    for dtype in DTYPES:
        for tokens in (1, 3):
            _check_output(attn, attend, inputs(shape, attn, tokens=tokens, dtype=dtype))
    if isinstance(attend, nn.Module):
        twin, data = reloaded(attend), inputs(shape, attn)
        assert isinstance(twin, Attend)
        own, other = (run(attn.replace(attend=a), data)[0].out for a in (attend, twin))
        promise(torch.equal(own, other), attend, "a state_dict that is loaded attends as before")
    check_attention(attn, shape=shape, part=attend)


def run(
    attn: HashAttention, data: Inputs, selection: Selection | None = None, *, lse: bool = False, weights: bool = False
) -> tuple[Output, Selection | None]:
    """Attend to a fresh cache, to this selection or the composition's own."""
    cache = filled(attn, data)
    if selection is None:
        return attn.run(data.q, cache, need_lse=lse, need_weights=weights)
    query = attn.encoder.encode_query(data.q) if attn.encoder is not None else None
    view = cache.view(query, data.q.shape[1], cache.spans(data.q.shape[2]))
    output = attn.attend.attend(data.q, cache, selection, data.scale, view=view, need_lse=lse, need_weights=weights)
    return output, selection


def _check_output(attn: HashAttention, attend: Attend, data: Inputs) -> None:
    output, selection = run(attn, data, lse=True, weights=True)
    plain = run(attn, data)[0].out
    out, lse, weights = output.out, output.lse, output.weights
    promise(near(plain, out, 2 * data.rounding), attend, "output does not depend on what else is asked for")
    promise(lse is not None and weights is not None, attend, "lse and weights are given on request")
    assert lse is not None and weights is not None
    shape = data.q.shape[:3]
    promise(lse.shape == shape and lse.dtype == torch.float32, attend, f"lse is float32 [B, Hq, T], got {[*lse.shape]}")
    promise(weights.dtype == torch.float32, attend, f"weights are float32, got {weights.dtype}")
    if selection is None:
        ids = torch.arange(data.k.shape[2], device=out.device).expand(*shape, -1)
    else:
        ids = selection.ids.repeat_interleave(shape[1] // selection.ids.shape[1], 1)
    slots = (*shape, ids.shape[-1])
    promise(weights.shape == slots, attend, f"weights are [B, Hq, T, K] = {slots}, got {[*weights.shape]}")
    promise((weights >= 0) & ((weights == 0) | (ids >= 0)), attend, "weights are at least 0, and 0 in empty slots")
    sums = weights.double().sum(-1)
    rounding = slots[-1] * torch.finfo(torch.float32).eps
    promise(near(sums, ((ids >= 0).any(-1)).double(), rounding), attend, "weights of a query sum to 1")
    values = data.v.double().repeat_interleave(shape[1] // data.v.shape[1], 1)
    spread = torch.zeros(*shape, data.k.shape[2] + 1, dtype=torch.float64, device=out.device)
    spread.scatter_add_(-1, ids.where(ids >= 0, data.k.shape[2]).long(), weights.double())
    promise(near(out, spread[..., :-1] @ values, data.rounding), attend, "output is the values by their weights")


def _check_critical(attn: HashAttention, attend: Attend, data: Inputs) -> None:
    own = run(attn, data)[1]
    assert own is not None
    ids = own.ids
    whole, _ = run(attn, data, Selection(ids), lse=True)
    expected = attention64(data, kept(ids, data.k.shape[2], data.q.shape[1]) & visible(data))
    promise(near(whole.out, expected, data.rounding), attend, "logits of critical keys are exact: q.k times the scale")
    halves = [run(attn, data, Selection(part.contiguous()), lse=True)[0] for part in ids.split((7, 13), -1)]
    promise(all(half.lse is not None for half in halves), attend, "lse is given on request")
    joined = merge(halves)
    promise(near(joined.out, whole.out, 4 * data.rounding), attend, "outputs over disjoint keys merge by their lse")
    moved = Selection(torch.nn.functional.pad(ids, (3, 2), value=-1))
    promise(near(run(attn, data, moved)[0].out, whole.out, 2 * data.rounding), attend, "empty slots count for nothing")


def _check_nothing(attn: HashAttention, attend: Attend, data: Inputs) -> None:
    none = torch.full((*data.q.shape[:3], 4), -1, dtype=torch.int32, device=data.q.device)
    output, _ = run(attn, data, Selection(none), lse=True)
    promise(output.out == 0, attend, "a query that keeps no key gets zeros")
    promise(output.lse is not None and output.lse == -torch.inf, attend, "a query that keeps no key has an lse of -inf")
