"""Rotary positions in kernels: which channels are a pair, and scores of pairs of planes that are turned in float16.

Channels d and d + PAIRS are a pair.  Where all channels are in pairs and the planes of a head are as many in its first
half as in its second, a lane's partner is the same lane of another plane: PAIRS is known when a kernel is compiled, and
what stands for other models is left out then.
"""

import triton
import triton.language as tl


@triton.jit
def pair_of(lane, FIRST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """Which of PAIRS pairs each of the channels FIRST + lane is of, lane < COUNT, where channels d and d + PAIRS are a
    pair; any pair for channels behind them all."""
    d = lane + FIRST
    if FIRST + COUNT <= PAIRS:
        found = d
    elif (FIRST >= PAIRS) & (FIRST + COUNT <= 2 * PAIRS):
        found = d - PAIRS
    elif FIRST + COUNT <= 2 * PAIRS:
        found = tl.where(d < PAIRS, d, d - PAIRS)
    else:
        found = tl.where(d < PAIRS, d, tl.where(d < 2 * PAIRS, d - PAIRS, d // 2))
    return found


@triton.jit
def partner_of(lane, FIRST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """The other channel of each channel's pair, as in `pair_of`; of no pair: itself."""
    d = lane + FIRST
    if FIRST + COUNT <= PAIRS:
        found = d + PAIRS
    elif (FIRST >= PAIRS) & (FIRST + COUNT <= 2 * PAIRS):
        found = d - PAIRS
    else:
        found = tl.where(d < PAIRS, d + PAIRS, tl.where(d < 2 * PAIRS, d - PAIRS, d))
    return found


@triton.jit
def turn_of(lane, FIRST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """-1 for the first channel of a pair, 1 for the second, as in `pair_of`, 0 for those of no pair."""
    d = lane + FIRST
    return tl.where(d < PAIRS, -1.0, tl.where(d < 2 * PAIRS, 1.0, 0.0))


@triton.jit
def quarter_on(partner, loaded, ALIGNED: tl.constexpr):
    """The lanes of a query a quarter turn on: those of the partner's plane, or else as they were loaded."""
    if ALIGNED:
        found = partner
    else:
        found = loaded
    return found


@triton.jit
def pair_scores(n, m, cosine, sine, far_cosine, far_sine, e, f, h, g, s, ALIGNED: tl.constexpr):
    """Scores s [tokens, rows] with those of the planes n and m, [tokens, lanes] float16, added.

    e, f   the query of n's lanes and of m's, [lanes, rows] float16
    h, g   the same a quarter turn on
    A pair that stands in one lane is turned by the cosine and sine of n's lanes, and meets the query; else every number
    times the cosine of its own lane meets the query, and times its sine the query a quarter turn on.
    """
    if ALIGNED:
        s = tl.dot(n * cosine - m * sine, e, s)
        s = tl.dot(m * cosine + n * sine, f, s)
    else:
        s = tl.dot(n * cosine, e, s)
        s = tl.dot(n * sine, h, s)
        s = tl.dot(m * far_cosine, f, s)
        s = tl.dot(m * far_sine, g, s)
    return s
