"""The fused decode step in CUDA C++: exact top-k attention in two kernels."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.scratch import Scratch

LEVELS = 32  # as in step.cuh
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_POINTERS = (
    "q", "keys", "values", "query", "codes", "starts", "length", "bounds", "totals", "arrived", "lists", "counts",
    "parts", "stats", "ids", "out", "lse",
)  # fmt: skip
_INTS = (
    "k", "radius", "sinks", "recents", "margin", "room", "code_room", "chunks", "slots", "kv_heads",
)  # fmt: skip


class Step(ctypes.Structure):
    """What the kernels are given: struct Step of step.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS), ("share", ctypes.c_double), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _INTS),
    ]  # fmt: skip


def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, scratch: Scratch, *, scale: float, causal: bool = True, scan_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode`, which does the same."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads, room, code_room = keys.shape[1], keys.shape[2], codes.shape[2]
    group, device = q_heads // kv_heads, q.device
    summed = group if rule.shared else 1
    planes, words = query.shape[3:]
    tensor_cores = summed > 1 and q.dtype != torch.float32
    rows_each = 32 if summed > 1 and not tensor_cores else 64  # keys of a program of the second kernel
    chunk = 2048 if words == 1 else 1024
    rows, chunks = batch * q_heads // summed * tokens, -(-code_room // chunk)
    slots = -(-max(1, rule.slots(room)) // rows_each) * rows_each
    spread = summed * (2**planes - 1)  # the largest share of one bit in a distance
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    ids = torch.empty((rows, slots), dtype=torch.int32, device=device)
    buffers = {
        "totals": scratch.borrow("totals", (rows, LEVELS), torch.int32, device),
        "arrived": scratch.borrow("arrived", (rows,), torch.int32, device),
        "lists": scratch.borrow("lists", (rows, chunks, chunk), torch.int16, device),
        "counts": scratch.borrow("counts", (rows, LEVELS, chunks), torch.int16, device),
        "parts": scratch.borrow("parts", (rows, slots // rows_each, summed, -(-dim // 64) * 64), torch.float32, device),
        "stats": scratch.borrow("stats", (rows, slots // rows_each, summed, 2), torch.float32, device),
    }
    tensors = {
        "q": q, "keys": keys, "values": values, "query": query, "codes": codes, "starts": starts, "length": length,
        "bounds": bounds, "ids": ids, "out": out, "lse": lse, **buffers,
    }  # fmt: skip
    step = Step(
        **{name: x.data_ptr() for name, x in tensors.items()}, share=rule.share or 0.0, scale=scale, k=rule.k or 0,
        radius=min(rule.radius or 0, 64 * words * spread), sinks=rule.sinks, recents=rule.recents,
        margin=2 * math.isqrt(spread), room=room, code_room=code_room, chunks=chunks, slots=slots, kv_heads=kv_heads,
    )  # fmt: skip
    lanes = max(n for n in (1, 2, 3, 4) if group // summed % n == 0)
    common = {
        "G": group, "SUM": summed, "TOKENS": tokens, "WORDS": words, "PLANES": planes, "CAUSAL": causal,
        "RADIUS": rule.radius is not None,
        "ALIGNED": code_room * words % 2 == 0 and codes.data_ptr() % 16 == 0,
    }  # fmt: skip
    defines = compiler.defines_of(common | {"LANES": lanes, "DIM": dim, "TYPE": TYPES[q.dtype], "PREFETCH": 1})
    early = torch.cuda.get_device_capability(device) >= (9, 0)
    scan = compiler.kernel("scan", defines, q.get_device())
    compiler.launch(scan, (chunks, kv_heads * group // summed // lanes, batch * tokens), 256, step, early=early)
    if not scan_only:
        own = {"DIM": dim, "TYPE": TYPES[q.dtype], "ROWS": rows_each, "SHARE": rule.share is not None}
        defines = compiler.defines_of(common | {"LANES": 1} | own)
        attend = compiler.kernel("attend", defines, q.get_device())
        compiler.launch(attend, (slots // rows_each, kv_heads * group // summed, batch * tokens), 128, step, early=early)
    return out, lse, ids.view(batch, -1, tokens, slots)
