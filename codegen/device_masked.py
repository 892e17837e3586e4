"""Sketches of the query at chosen channels, in kernels: those for two sub-tiles of keys are the rows of one product."""

import triton
import triton.language as tl


@triton.jit
def twice(rows):
    """What every row has, [rows], for the rows of two sub-tiles, one behind the other.

    Not joined: of what stands behind a join and a load of bytes Triton (3.6, 3.7) takes a product of 16 numbers to be
    one of 32, and its sums are wrong."""
    return tl.reshape(tl.broadcast_to(rows[None, :], (2, rows.shape[0])), (2 * rows.shape[0],))


@triton.jit
def sub_tiles(sketches):
    """Sketches [rows of two sub-tiles, lanes] as what codes of either meet, [lanes, rows]."""
    ROWS: tl.constexpr = sketches.shape[0] // 2
    apart = tl.permute(tl.reshape(sketches, (2, ROWS, sketches.shape[1])), (1, 2, 0))
    first, second = tl.split(apart)
    return tl.trans(first), tl.trans(second)


@triton.jit
def planes_apart(query):
    """The first and the second half of the lanes of a query [lanes, rows]."""
    LANES: tl.constexpr = query.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(query, (2, LANES, query.shape[1])), (1, 2, 0)))
