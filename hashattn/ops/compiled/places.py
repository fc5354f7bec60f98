"""Where a step's numbers stand, and the memory that it writes on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# What a step is given, by its place in an int64 array. Addresses first, all of memory in one piece:
Q, QUERY = 0, 1  # [B, Hq, T, D] like keys; uint64 [B, Hq, T, P, W], written where there is a map
KEYS, VALUES = 2, 3  # [B, Hkv, room, D], float32, or uint16 for bfloat16
CODES, NORMS = 4, 5  # uint64 [B, Hkv, code_room, W]; uint16 for bfloat16 [B, Hkv, norm_room], |k - centre|
CENTRE, STARTS = 6, 7  # float32 [B, Hkv, D]; int32 [B], each row's first column
QUERY_MAP, KEY_MAP = 8, 9  # float32 [D, bits] of linear maps; 0 where queries, keys are encoded already
OUT, LSE, WEIGHTS = 10, 11, 12  # [B, Hq, T, D] like keys; float32 [B, Hq, T]; float32 [B, Hq, T, slots], 0 for none
IDS, TIERS = 13, 14  # int32 and int8 [B, H, T, slots], critical keys before medium ones; 0 for no tiers
BASES = 15  # int32 [B, H, T], zeros at first: where distances began, for the next step
BEFORE, BEFORE_WEIGHTS = 16, 17  # of the layer before: int32 [B, H', T, K'], float32 [B, H' * G', T, K']
# then sizes:
BATCH, Q_HEADS, KV_HEADS, TOKENS, DIM, ROOM, CODE_ROOM, NORM_ROOM = range(18, 26)
WORDS, PLANES, BITS, SLOTS, LENGTH, ENCODED = range(26, 32)  # filled columns, and how many of them have codes
BEFORE_HEADS, BEFORE_GROUP, BEFORE_SLOTS = range(32, 35)
# and the rule: k of -1 where the share says how many, radius of -1 for any; flags are 0 or 1.
K, MIN_K, SINKS, RECENTS, RADIUS, SHARED, BIASED, CAUSAL, TIERED, ESTIMATED, WITH_NORMS = range(35, 46)
VOTES, VOTE, PRIOR = range(46, 49)  # choices that are enough, and what is taken off a choice's distances; 0 for none
# The queries' MLP: whether they are scaled first, how many layers, and of each its weights, biases and width.
UNIT, LAYERS, LAYER, MOST_LAYERS = 49, 50, 51, 4
# The residual of estimates: float32 query [hidden, bits], bias, key [hidden, bits], out and its bias; how wide, or 0.
RESIDUAL = LAYER + 3 * MOST_LAYERS
HIDDEN = RESIDUAL + 5
COUNT = HIDDEN + 1
# In a float64 array: share of visible keys, share of critical ones, scale of the logits, a of the estimate, and the
# ratio of the uniform share that a prior is to be above.
SHARE, CRITICAL_SHARE, SCALE, A, RATIO = range(5)
# What is done, as bits: queries encoded, and the newest keys; heads ranked by raw distances; votes counted, and what
# the layer before attended to; keys chosen and attended to.
QUERIES, NEWEST, RANK, TALLY, ATTEND = 1, 2, 4, 8, 16

FLOAT, HALF, WORD, INT, BYTE = np.float32(0), np.uint16(0), np.uint64(0), np.int32(0), np.uint8(0)  # as what lies there
AT_ONCE = 16  # queries encoded at a time


class Work(NamedTuple):
    """What a thread writes on the way.

    Attributes:
        near: uint8 [room + 144]; sums: uint16 [BLOCK]; query: uint64 [G * P * W].
        projected: float32 [AT_ONCE, bits, to a multiple of 64]; hidden: float32 [2, AT_ONCE, the widest layer].
        q, out: float32 [G * D]; logits: float32 [G, slots + 4].
        ids, nearer: int32 [slots + 8].
        table: float32 [bits / 4, 16, hidden]; begun: float32 [2, hidden], of a residual.
    """

    near: Any
    sums: Any
    projected: Any
    hidden: Any
    query: Any
    q: Any
    out: Any
    logits: Any
    ids: Any
    nearer: Any
    table: Any
    begun: Any


class Layer(NamedTuple):
    """What the choices of one query's heads share, where their distances are calibrated.

    Attributes:
        near: uint8 [choices, room + 144], raw distances; limits: int64 [choices, 3], see loops.rank.
        votes, more: uint8 [room + 144], how many choices keep a key, and what its distances are raised by.
        prior: float32 [room + 144].
    """

    near: Any
    limits: Any
    votes: Any
    more: Any
    prior: Any
