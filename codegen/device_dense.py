"""Attention of many query rows over decoded tokens, in Triton: no scheme changes it, so it is written once, by hand.

Glossary:
  bh, b, h       program's sequence and kv head; split: its share of the tokens; block: its ROWS query rows
  rows           query tokens x heads of the group, along the tensor core's longest side: each decoded tile is read once
                 for all of them
  u              token counted from the first one behind the sinks; low, high: those of this chunk, whose decoded keys
                 are (B, H, held, DIM), values (B, H, held, VALUE_DIM), token u in row u - low
  clean tiles    packed on both sides and seen by every row: the main loop, no masks
  other tiles    sinks, window, exact tokens, the newest: decoded or exact, token by token, and masked
  size           power of two that a row of the query was divided by
  met            what decoded keys meet, where queries are rounded for packed tokens, and `more` what is added to that

A chunk goes on where the one before it ended: partial outputs and their log-sum-exps are read and written again, so
that working memory does not grow with the tokens.  Keys, values and weights are rounded as at the edges of the kernels
that read pages.
"""

import triton
import triton.language as tl

from .device import above, tanh

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attended(s, values, seen, size, peak, mass, total, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Running maximum, sum of weights and weighted values, with one tile more, of scores s."""
    s = s * size[:, None]
    if CAPPED:
        s = softcap * tanh(s / softcap) * LOG2E
    if MASKED:
        s = tl.where(seen, s, -1.0e30)
    higher = tl.maximum(peak, tl.max(s, 1))
    decay = tl.exp2(peak - higher)
    p = tl.exp2(s - higher[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    mass = mass * decay + tl.sum(p, 1)
    total = tl.dot(p.to(values.dtype), values, total * decay[:, None], input_precision="ieee")
    return higher, mass, total


@triton.jit(
    do_not_specialize=["queries", "low", "high", "held", "ring", "window", "ahead", "room", "origin", "splits", "lines"]
)
def attend_dense(
    query_ptr,
    met_ptr,
    more_ptr,
    keys_ptr,
    values_ptr,
    packed_keys_ptr,
    packed_values_ptr,
    length_ptr,
    start_ptr,
    first_ptr,
    key_rows_ptr,
    value_rows_ptr,
    place_ptr,
    asked_ptr,
    partial_ptr,
    lse_ptr,
    queries,
    low,
    high,
    held,
    ring,
    window,
    ahead,
    room,
    origin,
    splits,
    lines,
    scaling,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPPED: tl.constexpr,
    PLACED: tl.constexpr,
    ROUNDED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GOES_ON: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partials of a chunk's tokens u in [low, high), those of sinks with u = 0, added to those of earlier chunks."""
    bh = tl.program_id(0)
    split = tl.program_id(1)
    block = tl.program_id(2)
    b = bh // HEADS
    h = bh % HEADS
    packed_keys = tl.load(packed_keys_ptr + b)
    packed_values = tl.load(packed_values_ptr + b)
    length = tl.load(length_ptr + b)
    start = tl.load(start_ptr + b)
    first = tl.load(first_ptr + b)
    asked = tl.load(asked_ptr + b) if PLACED else length + ahead
    dtype = keys_ptr.dtype.element_ty

    # which rows: (query token, head of the group), and the positions that they see
    row_index = block * ROWS + tl.arange(0, ROWS)
    live = row_index < queries * GROUP
    token = row_index // GROUP
    head = (b * HEADS * GROUP + h * GROUP + row_index % GROUP).to(tl.int64)
    last = asked - queries + token
    oldest = tl.maximum(start, last - window + 1)
    lane = tl.arange(0, LANES)
    place = tl.arange(0, VALUE_LANES)
    source = ((head * queries + token) * DIM)[:, None] + lane[None, :]
    within = live[:, None] & (lane < DIM)[None, :]
    x = tl.load(query_ptr + source, mask=within, other=0.0).to(tl.float32) * scaling
    top = tl.max(tl.abs(x), 1)
    if ROUNDED:
        z = tl.load(met_ptr + source, mask=within, other=0.0) * scaling
        top = tl.maximum(top, tl.max(tl.abs(z), 1))
    size, inverse = above(top)
    query = (x * inverse[:, None]).to(dtype)
    met = query
    if ROUNDED:
        met = (z * inverse[:, None]).to(dtype)
    if SHIFTED:
        more = tl.load(more_ptr + head * queries + token, mask=live, other=0.0) * scaling * inverse

    out = (split.to(tl.int64) * tl.num_programs(0) + bh) * lines + row_index
    partial = partial_ptr + out[:, None] * VALUE_DIM + place[None, :]
    stored = live[:, None] & (place < VALUE_DIM)[None, :]
    if GOES_ON:
        peak = tl.load(lse_ptr + out, mask=live, other=-1.0e30)
        mass = tl.where(peak > -1.0e29, 1.0, 0.0)
        total = tl.load(partial, mask=stored, other=0.0)
    else:
        peak = tl.full([ROWS], -1.0e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, VALUE_LANES], tl.float32)

    # tiles of the chunk that some row sees, this program's share of them, and the clean ones among these
    eldest = asked - queries + block * ROWS // GROUP
    newest = asked - queries + tl.minimum((block * ROWS + ROWS - 1) // GROUP, queries - 1)
    end = tl.minimum(high, length - SINKS)
    begin = tl.where(low == 0, -SINKS, low)
    clean = low
    clean_end = low
    if not PLACED:
        end = tl.minimum(end, newest + 1 - SINKS)
        begin = tl.maximum(begin, tl.maximum(start, eldest - window + 1) - SINKS)
        clean = tl.maximum(low, tl.maximum(start, newest - window + 1) - SINKS)
        clean_end = tl.minimum(tl.minimum(packed_keys, packed_values), tl.minimum(end, eldest + 1 - SINKS))
    shift: tl.constexpr = (SINKS + TOKENS - 1) // TOKENS  # tiles before the first of u = 0, so that none is negative
    begin = (begin + shift * TOKENS) // TOKENS - shift
    end = (tl.maximum(end, -SINKS) + shift * TOKENS + TOKENS - 1) // TOKENS - shift
    share = (tl.maximum(end - begin, 0) + splits - 1) // splits
    begin = tl.minimum(begin + split * share, tl.maximum(begin, end))
    end = tl.minimum(begin + share, tl.maximum(begin, end))
    clean = tl.minimum(tl.maximum((clean + TOKENS - 1) // TOKENS, begin), end)
    clean_end = tl.minimum(tl.maximum(tl.maximum(clean_end, 0) // TOKENS, clean), end)

    keys = keys_ptr + bh.to(tl.int64) * held * DIM
    values = values_ptr + bh.to(tl.int64) * held * VALUE_DIM
    t = tl.arange(0, TOKENS)
    for tile in tl.range(clean, clean_end, num_stages=STAGES):
        row = tile * TOKENS - low + t
        if LANES == DIM:
            k = tl.load(keys + lane[:, None] + (row * DIM)[None, :])
        else:
            k = tl.load(keys + lane[:, None] + (row * DIM)[None, :], mask=(lane < DIM)[:, None], other=0.0)
        if VALUE_LANES == VALUE_DIM:
            v = tl.load(values + (row * VALUE_DIM)[:, None] + place[None, :])
        else:
            known = (place < VALUE_DIM)[None, :]
            v = tl.load(values + (row * VALUE_DIM)[:, None] + place[None, :], mask=known, other=0.0)
        s = tl.dot(met, k, input_precision="ieee")
        if SHIFTED:
            s = s + more[:, None]
        peak, mass, total = attended(s, v, 0, size, peak, mass, total, softcap, CAPPED, False)

    key_rows = key_rows_ptr + bh.to(tl.int64) * (SINKS + ring) * DIM
    value_rows = value_rows_ptr + bh.to(tl.int64) * (SINKS + ring) * VALUE_DIM
    for step in tl.range(0, end - begin - (clean_end - clean), num_stages=1):
        tile = tl.where(begin + step < clean, begin + step, begin + step + clean_end - clean)
        u = tile * TOKENS + t
        here = (u >= -SINKS) & (u < length - SINKS)
        stand = u + SINKS
        if PLACED:
            stand = tl.load(place_ptr + bh.to(tl.int64) * room + u + SINKS, mask=here, other=0) + origin
        seen = (stand[None, :] <= last[:, None]) & (stand[None, :] >= oldest[:, None]) & here[None, :]
        row = tl.where(u < 0, u + SINKS, SINKS + (u - first) % ring)
        coded = (u >= 0) & (u < packed_keys)
        there = (lane < DIM)[:, None] & coded[None, :]
        k = tl.load(keys + lane[:, None] + ((u - low) * DIM)[None, :], mask=there, other=0.0)
        there = (lane < DIM)[:, None] & (here & (coded == 0))[None, :]
        exact = tl.load(key_rows + lane[:, None] + (row * DIM)[None, :], mask=there, other=0.0)
        exact = exact.to(tl.float32).to(dtype)
        if ROUNDED:  # of a decoded key the exact one is 0, of an exact one the decoded
            s = tl.dot(query, exact, tl.dot(met, k, input_precision="ieee"), input_precision="ieee")
        else:
            s = tl.dot(query, tl.where(coded[None, :], k, exact), input_precision="ieee")
        if SHIFTED:
            s = s + tl.where(coded[None, :], more[:, None], 0.0)
        coded = (u >= 0) & (u < packed_values)
        there = coded[:, None] & (place < VALUE_DIM)[None, :]
        v = tl.load(values + ((u - low) * VALUE_DIM)[:, None] + place[None, :], mask=there, other=0.0)
        there = (here & (coded == 0))[:, None] & (place < VALUE_DIM)[None, :]
        exact = tl.load(value_rows + (row * VALUE_DIM)[:, None] + place[None, :], mask=there, other=0.0)
        v = tl.where(coded[:, None], v, exact.to(tl.float32).to(dtype))
        peak, mass, total = attended(s, v, seen, size, peak, mass, total, softcap, CAPPED, True)

    whole = tl.where(mass > 0.0, mass, 1.0)
    tl.store(partial, total / whole[:, None], mask=stored)
    tl.store(lse_ptr + out, tl.where(mass > 0.0, peak + tl.log2(whole), -1.0e30), mask=live)
