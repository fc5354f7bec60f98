"""Which kernels a decode step in CUDA C++ launches, and what they are compiled with."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from hashattn.ops.decode.cuda import compiler
from hashattn.ops.decode.device import starts_early
from hashattn.ops.decode.sizes import ROWS, Sizes

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
RUN = 8  # neighbouring columns of a chunk
AT_ONCE = 4  # programs of a multiprocessor, so that all are there from the start
CACHED = 32 << 20  # bytes of keys and values that a cache holds until they are wanted


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is compiled with, its programs and their threads; even: as many on each multiprocessor."""

    name: str
    defines: compiler.Defines
    grid: compiler.Grid
    threads: int
    even: bool = False

    def bound(self, argument: ctypes.Structure, device: torch.device) -> compiler.Launcher:
        """Ready to be launched with an argument, on the current GPU."""
        kernel = compiler.kernel(self.name, self.defines, -1 if device.index is None else device.index)
        early = starts_early(device)
        return compiler.Launcher(kernel, self.grid, self.threads, argument, early=early, even=self.even)


@functools.cache
def launches(
    sizes: Sizes, dtype: torch.dtype, causal: bool, aligned: bool, multiprocessors: int, tiers: bool = False
) -> tuple[Launch, ...]:
    """The launches of a step; aligned: codes may be read in 16 bytes; tiers: logits of medium keys are estimated."""
    rule, summed, queries = sizes.rule, sizes.summed, sizes.batch * sizes.tokens
    lanes, heads = sizes.lanes, sizes.kv_heads * sizes.group // summed
    common = {"G": sizes.group, "SUM": summed, "WORDS": sizes.words, "PLANES": sizes.planes, "TOKENS": sizes.tokens}
    common |= {"DIM": sizes.head_dim, "TYPE": TYPES[dtype], "CAUSAL": causal, "RADIUS": rule.radius is not None}
    common |= {"BIASED": rule.biased, "ALIGNED": aligned, "TIERS": tiers}
    if rule.calibrated:
        common |= {"CALIBRATED": True, "REACH": sizes.reach // sizes.unit, "SPAN": sizes.span // sizes.unit}
        common |= {"VOTES": rule.vote_share is not None, "PRIOR": rule.prior_ratio is not None}

    def launch(name: str, grid: compiler.Grid, threads: int, even: bool, **own: int) -> Launch:
        return Launch(name, tuple((key, int(value)) for key, value in (common | own).items()), grid, threads, even)

    if rule.chunks is not None:
        own = {"LOCAL": 1, "CHUNKS": rule.chunks, "RUN": RUN, "LANES": lanes, "ROWS": rule.per_chunk}
        return (launch("local", (rule.chunks, heads // lanes, queries), 256, False, **own),)
    scans, attends = (sizes.cuda_chunks, heads // lanes, queries), (sizes.slots // ROWS, heads, queries)
    few, crowded = math.prod(scans) <= AT_ONCE * multiprocessors, math.prod(attends) > AT_ONCE * multiprocessors
    gathered = 2 * sizes.rows * sizes.slots * sizes.head_dim * dtype.itemsize
    share = rule.share is not None
    found = [launch("scan", scans, 256, few, LANES=lanes, PREFETCH=gathered <= CACHED)]
    if rule.calibrated:
        chunks, many = (sizes.cuda_chunks, queries, 1), sizes.cuda_chunks * queries > multiprocessors
        threads = 512 if summed > 1 or many else 1024
        found.append(launch("calibrate", chunks, threads, False, LANES=1, SHARE=share, CROWDED=many))
    own = {"LANES": 1, "ROWS": ROWS, "SHARE": share, "CROWDED": crowded}
    return *found, launch("attend", attends, 128, not crowded, **own)
