"""The fused decode step in CUDA C++: exact top-k attention in two kernels, LocalTopK in one."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.sizes import ROWS, Sizes, carve

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
RUN = 8  # neighbouring columns of a chunk
CACHED = 32 << 20  # bytes of keys and values that a cache holds until they are wanted
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
    bounds: Tensor, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True, scan_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode`, which does the same.

    Raises:
        RuntimeError: a kernel does not compile or launch.
    """
    sizes = Sizes.of(q, query, keys, codes, rule)
    dim, summed, rows, device = sizes.head_dim, sizes.summed, sizes.rows, q.device
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    ids = torch.empty((rows, sizes.slots), dtype=torch.int32, device=device)
    tensors = {
        "q": q, "keys": keys, "values": values, "query": query, "codes": codes, "starts": starts, "length": length,
        "bounds": bounds, "arrived": bounds[sizes.hints], "totals": bounds[sizes.hints + 1 :], "ids": ids, "out": out,
        "lse": lse, **carve(workspace, sizes.cuda),
    }  # fmt: skip
    step = Step(
        **{name: x.data_ptr() for name, x in tensors.items()}, share=rule.share or 0.0, scale=scale, k=rule.k or 0,
        radius=min(rule.radius or 0, 64 * sizes.words * sizes.spread), sinks=rule.sinks, recents=rule.recents,
        margin=2 * math.isqrt(sizes.spread), room=sizes.room, code_room=sizes.code_room, chunks=sizes.cuda_chunks,
        slots=sizes.slots, kv_heads=sizes.kv_heads,
    )  # fmt: skip
    lanes = max(n for n in (1, 2, 3, 4) if sizes.group // summed % n == 0)
    common = {
        "G": sizes.group, "SUM": summed, "WORDS": sizes.words, "PLANES": sizes.planes, "TOKENS": sizes.tokens,
        "DIM": dim, "TYPE": TYPES[q.dtype], "CAUSAL": causal, "RADIUS": rule.radius is not None,
        "ALIGNED": sizes.code_room * sizes.words % 2 == 0 and codes.data_ptr() % 16 == 0,
    }  # fmt: skip
    heads, queries = sizes.kv_heads * sizes.group // summed, sizes.batch * sizes.tokens

    def launch(name: str, grid: tuple[int, int, int], threads: int, **own: int) -> None:
        kernel = compiler.kernel(name, compiler.defines_of(common | own), q.get_device())
        compiler.launch(kernel, grid, threads, step, early=torch.cuda.get_device_capability(device) >= (9, 0))

    if rule.chunks is not None:
        launch(
            "local",
            (rule.chunks, heads // lanes, queries),
            256,
            LOCAL=1,
            CHUNKS=rule.chunks,
            RUN=RUN,
            LANES=lanes,
            ROWS=rule.per_chunk,
        )
        return out, lse, ids.view(sizes.batch, -1, sizes.tokens, sizes.slots)
    gathered = 2 * rows * sizes.slots * dim * q.element_size()
    launch("scan", (sizes.cuda_chunks, heads // lanes, queries), 256, LANES=lanes, PREFETCH=gathered <= CACHED)
    if not scan_only:
        grid = sizes.slots // ROWS, heads, queries
        launch("attend", grid, 128, LANES=1, ROWS=ROWS, SHARE=rule.share is not None)
    return out, lse, ids.view(sizes.batch, -1, sizes.tokens, sizes.slots)
