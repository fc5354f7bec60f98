"""DenseAttend: full attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hashattn.attend.base import Attend, Keys
from hashattn.core.types import Output, Selection
from hashattn.index.view import View
from hashattn.ops import dense as ops

# Keys up to which two products beat SDPA on a CPU (benchmarks/results/bench_cpu_auto.json). In 16 bits torch's products
# are many times slower than SDPA where the CPU has no instructions for them.
_MATMUL = {torch.float32: 1 << 14}


@dataclass(frozen=True)
class DenseAttend(Attend):
    """Attends to every visible key, without an index. Repeated KV is never materialised."""

    needs_selection = False

    def attend(
        self,
        q: Tensor,
        cache: Keys,
        selection: Selection | None,
        scale: float,
        *,
        view: View | None = None,
        need_lse: bool = False,
        need_weights: bool = False,
    ) -> Output:
        seen = cache.seen(q.shape[2])
        return dense(q, cache.keys, cache.values, seen, scale, need_lse=need_lse, need_weights=need_weights)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    *,
    need_lse: bool = False,
    need_weights: bool = False,
) -> Output:
    """Full attention of queries [B, Hq, T, D] to k, v [B, Hkv, N, D].

    A key that a query does not see matters to it in no way, also where it is NaN or inf; see :func:`masked` for a
    device that must not be waited for.

    Args:
        seen: bool [B, 1, T, N], which keys each query sees; None for all. Queries that see none get zeros.
        need_lse, need_weights: whether Output carries these; weights are then [B, Hq, T, N].
    """
    output = masked(q, k, v, seen, scale, need_lse=need_lse, need_weights=need_weights)
    if seen is None or q.is_meta or bool(output.out.isfinite().all()):
        return output
    broken = ~(k.isfinite() & v.isfinite()).all(-1)  # [B, Hkv, N]
    if not bool(broken.any()):
        return output
    k, v = (x.masked_fill(broken.unsqueeze(-1), 0) for x in (k, v))  # 0 * NaN would be NaN, in gradients too
    clean = masked(q, k, v, seen, scale, need_lse=need_lse, need_weights=need_weights)
    sees = (seen & broken.unsqueeze(2)).any(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, Hq, T]

    def chosen(broken: Tensor | None, clean: Tensor | None) -> Tensor | None:
        if broken is None or clean is None:
            return None
        return torch.where(sees.view(*sees.shape, *[1] * (clean.ndim - 3)), broken.detach(), clean)

    out = chosen(output.out, clean.out)
    assert out is not None
    return Output(out, chosen(output.lse, clean.lse), chosen(output.weights, clean.weights))


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    *,
    need_lse: bool = False,
    need_weights: bool = False,
) -> Output:
    """The same without a look at values: keys that are not seen must be finite."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = q_heads // kv_heads
    plain = seen is None and tokens == 1 and not (need_lse or need_weights or q.is_cuda)
    if plain and keys <= _MATMUL.get(q.dtype, 0):
        logits = (q.reshape(batch, kv_heads, group, dim) * scale) @ k.transpose(-1, -2)
        return Output((torch.softmax(logits, -1) @ v).view(batch, q_heads, 1, -1))
    folded = q.reshape(batch, kv_heads, group * tokens, dim)  # on CPUs SDPA's own GQA is several times slower at T = 1
    mask = None
    if seen is not None:
        mask = seen.expand(-1, group, -1, -1).reshape(batch, 1, group * tokens, keys)
    if mask is None and q.is_cuda and not (need_lse or need_weights):  # there flash splits the keys of its own GQA
        if tokens == 1 and ops.splits(q, k) and _alike(k, v) and not _traced_or_wanted(q, k, v):
            return Output(ops.attend_all(q, k, v, scale))
        return Output(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1))
    if not (need_lse or need_weights):
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
        if mask is not None:
            out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
        return Output(out.view(q.shape[:3] + v.shape[-1:]))
    logits = folded.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    lse, weights = logits.logsumexp(-1, keepdim=True), logits.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0)
    out = (weights.to(v.dtype) @ v).view(q.shape[:3] + v.shape[-1:])
    return Output(
        out,
        lse.view(batch, q_heads, tokens) if need_lse else None,
        weights.view(batch, q_heads, tokens, keys) if need_weights else None,
    )


def _alike(k: Tensor, v: Tensor) -> bool:
    """Whether values lie as keys do."""
    return (k.shape, k.stride(), k.dtype) == (v.shape, v.stride(), v.dtype)


def _traced_or_wanted(*given: Tensor) -> bool:
    """Whether a graph is traced, or gradients are wanted."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in given))
