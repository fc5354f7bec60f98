"""Seeded synthetic keys and queries, brute-force references, and hypothesis strategies that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hashattn import Encoder, FlatDot, FlatHamming, HashAttention, TopK
from hashattn.index.view import View

# ---- random inputs

seeds = st.integers(0, 2**32 - 1)
odd_lengths = st.sampled_from([1, 2, 63, 64, 65, 100])
odd_dims = st.sampled_from([8, 33, 64])
odd_bits = st.sampled_from([8, 63, 64, 65, 128, 1000])
heads = st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 4)])  # KV heads, group


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(
    seed: int, batch: int = 1, kv_heads: int = 2, group: int = 2, tokens: int = 1, keys: int = 65, dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gaussian queries, keys and values."""
    g = generator(seed)
    q = torch.randn(batch, kv_heads * group, tokens, dim, generator=g)
    k = torch.randn(batch, kv_heads, keys, dim, generator=g)
    v = torch.randn(batch, kv_heads, keys, dim, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def poison(x: Tensor, start: Tensor) -> Tensor:
    """A copy of [B, H, N, D] with NaN in the padding columns of each row."""
    padding = torch.arange(x.shape[2]) < start[:, None]
    return x.masked_fill(padding[:, None, :, None], torch.nan)


# ---- what a query sees, and attention over it, in float64


def visible_mask(tokens: int, keys: int, start: list[int], causal: bool = True) -> Tensor:
    """bool [B, 1, T, N]."""
    column = torch.arange(keys)
    end = torch.arange(keys - tokens, keys) if causal else torch.full((tokens,), keys - 1)
    first = torch.tensor(start)[:, None, None]
    return ((column >= first) & (column <= end[:, None])).unsqueeze(1)


def attention64(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept keys [B, 1 or Hq, T, N] in float64, KV repeated: (out, weights)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~keep, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(logits, -1))  # rows without keys: zeros
    return weights @ v.nan_to_num(), weights


def sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's own attention with explicitly repeated KV, in the inputs' dtype; zeros where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale)
    return out.masked_fill(~keep.any(-1, keepdim=True), 0)


def _tolerance(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> float:
    """What rounding may cost: four times the error that scaled_dot_product_attention itself makes in this dtype, and
    the rounding of the output. float64 inputs are computed in float32."""
    if q.dtype == torch.float64:
        return tolerance(q.float(), k.float(), v.float(), keep, scale)
    v = v.nan_to_num()
    exact = attention64(q, k, v, keep, scale)[0]
    own = (sdpa(q, k.nan_to_num(), v, keep, scale).double() - exact).abs().max().item()
    return 4 * own + torch.finfo(q.dtype).eps * exact.abs().max().item()


def selected(ids: Tensor, keys: int, q_heads: int) -> Tensor:
    """bool [B, Hq, T, N]: the keys in ids [B, Hq or Hkv, T, K]. Fails if a key is there twice."""
    ids = ids.repeat_interleave(q_heads // ids.shape[1], 1).long()
    counts = torch.zeros(*ids.shape[:3], keys + 1, dtype=torch.int64)
    counts.scatter_add_(-1, ids.where(ids >= 0, keys), torch.ones_like(ids))
    assert (counts[..., :keys] <= 1).all(), "a key was selected twice"
    return counts[..., :keys] == 1


# ---- brute force


def brute_nearest(distances: np.ndarray, k: int, keep: np.ndarray, forced: np.ndarray | None = None) -> list[int]:
    """Columns of one row, forced first, then by distance, ties to the larger column."""
    columns = [c for c in range(len(distances)) if keep[c]]
    forced = np.zeros(len(distances), bool) if forced is None else forced
    return sorted(columns, key=lambda c: (not forced[c], 0 if forced[c] else distances[c], -c))[:k]


def make_view(
    distances: Tensor, kv_heads: int, start: list[int] | None = None, causal: bool = True, **options: object
) -> View:
    """A View over given distances [B, Hq, T, N], as a cache makes it."""
    batch, q_heads, tokens, keys = distances.shape
    start = start or [0] * batch
    end = torch.arange(keys - tokens + 1, keys + 1) if causal else torch.full((tokens,), keys)
    spans = [[(first, e) for e in end.tolist()] for first in start]
    return View(spans, q_heads, kv_heads, keys, lambda: distances, **options)  # type: ignore[arg-type]


def tied_distances(seed: int, batch: int, q_heads: int, tokens: int, keys: int, high: int = 6) -> Tensor:
    """int32 [B, Hq, T, N] of few values, so that most of them tie."""
    return torch.randint(0, high, (batch, q_heads, tokens, keys), generator=generator(seed), dtype=torch.int32)


def hamming_numpy(query: Tensor, codes: Tensor) -> np.ndarray:
    """Brute-force distances int64 [B, Hq, T, N] from unpacked bits."""
    planes = query.unsqueeze(-2) if query.ndim == 4 else query
    codes = codes.repeat_interleave(planes.shape[1] // codes.shape[1], 1)

    def bits(x: Tensor) -> np.ndarray:
        return np.unpackbits(x.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")

    a, b = bits(planes)[:, :, :, None], bits(codes)[:, :, None, :, None]  # [B, Hq, T, 1, b, L], [B, Hq, 1, N, 1, L]
    return ((a != b).sum(-1) << np.arange(planes.shape[-2])).sum(-1)


# ---- two offset cones


@dataclass(frozen=True)
class Cones:
    """Queries [B, Hq, T, D], keys and values [B, Hkv, N, D] as models make them: every key shares a large mean
    direction, queries live in another cone, a few noisy channels dominate the keys, and each query has planted
    neighbours. truth holds the keys of largest q.k: int64 [B, Hq, T, 8]."""

    q: Tensor
    k: Tensor
    v: Tensor
    truth: Tensor


def cones(seed: int, *, kv_heads: int = 2, group: int = 2, tokens: int = 24, keys: int = 640, dim: int = 32) -> Cones:
    """Two offset cones. The cones are always the same; the seed draws the points in them."""
    fixed = generator(20260419)
    k_mean = torch.randn(1, kv_heads, 1, dim, generator=fixed) * 3
    noisy = torch.linalg.qr(torch.randn(dim, dim, generator=fixed)).Q[: dim // 8]  # channels that queries avoid
    q_mean = torch.randn(1, kv_heads * group, 1, dim, generator=fixed) * 0.5
    g = generator(seed)
    q = torch.randn(1, kv_heads * group, tokens, dim, generator=g) + q_mean
    q = q - q @ noisy.T @ noisy
    k = torch.randn(1, kv_heads, keys, dim, generator=g)
    k = k + 6 * torch.randn(1, kv_heads, keys, dim // 8, generator=g) @ noisy
    planted = torch.randperm(keys - 8, generator=g)[: group * tokens * 4].view(group, tokens, 4) + 8
    for head in range(kv_heads * group):
        for t in range(tokens):
            k[0, head // group, planted[head % group, t]] += 0.5 * q[0, head, t]
    k = k + k_mean
    exact = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)
    return Cones(q, k, torch.randn(k.shape, generator=g), exact.topk(8, -1).indices)


def recall(encoder: Encoder, data: Cones, budget: int = 32) -> float:
    """The share of each query's 8 best keys that are among the `budget` (5%) that the encoder finds nearest."""
    index = FlatDot() if encoder.code == "vector" else FlatHamming()
    attn = HashAttention(encoder, index, TopK(k=budget), engine="reference")
    cache = attn.new_cache(1, data.k.shape[1], data.k.shape[3])
    cache.append(data.k, data.v)
    ids, _ = cache.search(encoder.encode_query(data.q), budget)
    return (data.truth.unsqueeze(-1) == ids.long().unsqueeze(-2)).any(-1).float().mean().item()


def raises_naming(
    error: type[BaseException] | tuple[type[BaseException], ...], *words: str
) -> Callable[[Callable[[], object]], str]:
    """check(call): the call raises this error, and its message holds every word. Returns the message."""

    def check(call: Callable[[], object]) -> str:
        try:
            call()
        except error as e:
            missing = [w for w in words if w not in str(e)]
            assert not missing, f"{missing} not named in: {e}"
            return str(e)
        raise AssertionError(f"no {error} was raised")

    return check


def tolerance(*args: Any, **options: Any) -> Any:
    """Four times the rounding of one pass: a sparse pass rounds scores, weights and sums in another order."""
    return 4 * _tolerance(*args, **options)
