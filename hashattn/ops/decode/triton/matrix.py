"""Device functions that multiply a few vectors with blocks of a matrix, in float32 throughout.

A block has the shape [1, rows, columns] of one vector's products, so that it stays in the registers into which it was
loaded and serves all vectors of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(
    matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """[1, HEIGHT, WIDTH] of a matrix [ROWS, COLUMNS] from (row, column) on, zero beyond it."""
    rows = row + tl.arange(0, HEIGHT)[None, :, None]
    columns = column + tl.arange(0, WIDTH)[None, None, :]
    return tl.load(matrix + rows * COLUMNS + columns, mask=(rows < ROWS) & (columns < COLUMNS), other=0.0)


@triton.jit
def load_vectors(x, centre, rows, count, T, room, first, DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """Rows of `count` as float32 [vectors, PADDED], minus a centre for each T if there is one.

    These are T rows from the first on of each head's in x [heads, room, DIM]: all if T is the room and first 0. With
    UNIT they are scaled to unit mean square.
    """
    row, dims = rows[:, None], tl.arange(0, PADDED)[None, :]
    inside = (row < count) & (dims < DIM)
    at = (row // T).to(tl.int64) * room + first + row % T
    own = tl.load(x + at * DIM + dims, mask=inside, other=0.0).to(tl.float32)
    if centre is not None:
        own -= tl.load(centre + (row // T).to(tl.int64) * DIM + dims, mask=inside, other=0.0)
    if UNIT:
        square = tl.sum(own * own, 1, keep_dims=True) / DIM
        own *= tl.rsqrt(tl.maximum(square, 1e-12))
    return own


@triton.jit
def load_columns(vector, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[1, WIDTH] of a vector [SIZE] from first on, zero beyond it."""
    at = first + tl.arange(0, WIDTH)[None, :]
    return tl.load(vector + at, mask=at < SIZE, other=0.0)


@triton.jit
def times(x, block):
    """Vectors [vectors, HEIGHT] times a block [1, HEIGHT, WIDTH]: [vectors, WIDTH]."""
    return tl.sum(x[:, :, None] * block, 1)


@triton.jit
def relu(x):
    """x where it is above zero or NaN, zero elsewhere."""
    return tl.where(x <= 0, 0.0, x)
