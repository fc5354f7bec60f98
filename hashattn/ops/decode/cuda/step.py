"""The fused decode step in CUDA C++: exact top-k attention in two kernels, LocalTopK in one."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.device import on_its_device, starts_early
from hashattn.ops.decode.rule import Rule
from hashattn.ops.decode.sizes import ROWS, Sizes, carve

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
RUN = 8  # neighbouring columns of a chunk
WIDEST = 16  # bytes that kernels read at a time
AT_ONCE = 4  # programs of a multiprocessor, so that all are there from the start
CACHED = 32 << 20  # bytes of keys and values that a cache holds until they are wanted
_POINTERS = (
    "q", "keys", "values", "query", "codes", "starts", "length", "bounds", "totals", "arrived", "lists", "counts",
    "parts", "stats", "ids", "out", "lse",
)  # fmt: skip
_INTS = (
    "k", "least", "radius", "sinks", "recents", "margin", "room", "code_room", "chunks", "count_stride", "slots",
    "kv_heads",
)  # fmt: skip


class Step(ctypes.Structure):
    """What the kernels are given: struct Step of step.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS), ("share", ctypes.c_double), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _INTS),
    ]  # fmt: skip


@on_its_device
def decode(
    q: Tensor, query: Tensor, keys: Tensor, values: Tensor, codes: Tensor, starts: Tensor, length: Tensor,
    bounds: Tensor, rule: Rule, workspace: Tensor, *, scale: float, causal: bool = True, scan_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hashattn.ops.decode.triton.decode`, which does the same.

    Args:
        q: any view; the others are contiguous, and keys, values and workspace begin at a multiple of 16 bytes.

    Raises:
        ValueError: they are or do not.
        RuntimeError: a kernel does not compile or launch.
    """
    sizes = Sizes.of(q, query, keys, codes, rule)
    rule = sizes.rule
    device, q = q.device, q.contiguous()
    if q.data_ptr() % WIDEST:
        q = q.clone()
    _check_wide(keys=keys, values=values, workspace=workspace)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    ids = torch.empty((sizes.rows, sizes.slots), dtype=torch.int32, device=device)
    tensors = {
        "q": q, "keys": keys, "values": values, "query": query, "codes": codes, "starts": starts, "length": length,
        "bounds": bounds, "arrived": bounds[sizes.hints], "totals": bounds[sizes.hints + 1 :], "ids": ids, "out": out,
        "lse": lse, **carve(workspace, sizes.cuda),
    }  # fmt: skip
    if scan_only:  # what the second kernel would leave at zero is left alone
        tensors["totals"] = tensors["parts"]
    step = Step(
        **{name: x.data_ptr() for name, x in tensors.items()}, share=rule.share or 0.0, scale=scale, k=rule.k or 0,
        least=rule.least, radius=min(rule.radius or 0, sizes.farthest), sinks=rule.sinks, recents=rule.recents,
        margin=2 * math.isqrt(sizes.spread), room=sizes.room, code_room=sizes.code_room, chunks=sizes.cuda_chunks,
        count_stride=sizes.count_stride, slots=sizes.slots, kv_heads=sizes.kv_heads,
    )  # fmt: skip
    aligned = sizes.code_room * sizes.words % 2 == 0 and codes.data_ptr() % 16 == 0
    plan = launches(sizes, q.dtype, causal, aligned, torch.cuda.get_device_properties(device).multi_processor_count)
    early = starts_early(device)
    for one in plan[: 1 if scan_only and rule.chunks is None else None]:
        kernel = compiler.kernel(one.name, one.defines, q.get_device())
        compiler.launch(kernel, one.grid, one.threads, step, early=early, even=one.even)
    return out, lse, ids.view(sizes.batch, -1, sizes.tokens, sizes.slots)


def _check_wide(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.data_ptr() % WIDEST or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and begin at a multiple of {WIDEST} bytes, got strides {x.stride()} at "
                f"{x.data_ptr():#x}: give a copy, {name}.clone(memory_format=torch.contiguous_format)"
            )


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is compiled with, its programs and their threads; even: as many on each multiprocessor."""

    name: str
    defines: compiler.Defines
    grid: tuple[int, int, int]
    threads: int
    even: bool = False


def launches(sizes: Sizes, dtype: torch.dtype, causal: bool, aligned: bool, multiprocessors: int) -> list[Launch]:
    """The launches of a step; aligned: codes may be read in 16 bytes."""
    rule, summed = sizes.rule, sizes.summed
    lanes = max(n for n in (1, 2, 3, 4) if sizes.group // summed % n == 0)
    common = {
        "G": sizes.group, "SUM": summed, "WORDS": sizes.words, "PLANES": sizes.planes, "TOKENS": sizes.tokens,
        "DIM": sizes.head_dim, "TYPE": TYPES[dtype], "CAUSAL": causal, "RADIUS": rule.radius is not None,
        "BIASED": rule.biased, "ALIGNED": aligned,
    }  # fmt: skip
    heads, queries = sizes.kv_heads * sizes.group // summed, sizes.batch * sizes.tokens

    def launch(name: str, grid: tuple[int, int, int], threads: int, even: bool, **own: int) -> Launch:
        return Launch(name, tuple((key, int(value)) for key, value in (common | own).items()), grid, threads, even)

    if rule.chunks is not None:
        own = {"LOCAL": 1, "CHUNKS": rule.chunks, "RUN": RUN, "LANES": lanes, "ROWS": rule.per_chunk}
        return [launch("local", (rule.chunks, heads // lanes, queries), 256, False, **own)]
    scans, attends = (sizes.cuda_chunks, heads // lanes, queries), (sizes.slots // ROWS, heads, queries)
    few, crowded = math.prod(scans) <= AT_ONCE * multiprocessors, math.prod(attends) > AT_ONCE * multiprocessors
    gathered = 2 * sizes.rows * sizes.slots * sizes.head_dim * dtype.itemsize
    return [
        launch("scan", scans, 256, few, LANES=lanes, PREFETCH=gathered <= CACHED),
        launch(
            "attend", attends, 128, not crowded, LANES=1, ROWS=ROWS, SHARE=rule.share is not None, CROWDED=crowded
        ),
    ]  # fmt: skip
