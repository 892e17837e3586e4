"""Laws of a cache over time: however tokens come and go, it holds what the definitions say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvdsl import reference
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import SIDES
from kvdsl.static_cache import StaticCache
from kvdsl.window import Window, windows

from .attention import Step, require_close
from .cases import Case, law, require, require_equal, require_within
from .data import MODEST
from .driving import device_of

STEPS = 6
PLAIN = ("normal", "outlier_channel", "constant", "tiny")


def new_cache(case: Case, k: Tensor, v: Tensor) -> QuantizedCache:
    """An empty cache for the case, its calibrated numbers from k and v."""
    capacity = 2 * k.shape[2] + 4 * case.kernels.page_tokens
    device = device_of(case.kernels)
    return QuantizedCache(case.kernels, k.shape[0], params=case.params(k, v), capacity=capacity, device=device)


def filled(case: Case, k: Tensor, v: Tensor, cuts: Sequence[int] = ()) -> QuantizedCache:
    """A cache given all tokens, in chunks that end at `cuts`."""
    cache = new_cache(case, k, v)
    grow(cache, k, v, cuts)
    return cache


def grow(cache: QuantizedCache, k: Tensor, v: Tensor, cuts: Sequence[int] = ()) -> None:
    """Append k and v in chunks that end at `cuts`."""
    edges = [0, *sorted(cuts), k.shape[2]]
    for begin, end in zip(edges, edges[1:], strict=False):
        cache.append(k[:, :, begin:end].to(cache.device), v[:, :, begin:end].to(cache.device))


def require_same(what: str, one: QuantizedCache, other: QuantizedCache, *, pages: bool = True) -> None:
    """Equal lengths, packed counts, numbers and `pages` (to their last byte, so without what a crop has left in them),
    bit for bit; else LawBroken."""
    require(one.lengths == other.lengths, f"{what}: lengths {one.lengths}, wanted {other.lengths}")
    for side in SIDES:
        counts = one.packed(side), other.packed(side)
        require(counts[0] == counts[1], f"{what}: packed {side} {counts[0]}, wanted {counts[1]}")
        require_equal(f"{what}: {side}", one.dense(side), other.dense(side))
    states = one.state(), other.state()
    for b in range(one.batch if pages else 0):
        count = -(-max(one.packed("keys")[b], one.packed("values")[b]) // one.kernels.page_tokens)
        first, second = (s.pool[s.table[b, :count].long()] for s in states)
        require_equal(f"{what}: pages of sequence {b}", first, second)


@law("P28", kinds=PLAIN)
def chunks_do_not_matter(case: Case) -> None:
    """P28: one token at a time, in chunks of any size, or all at once: the same bytes and the same exact rows."""
    k, v = case.pair(case.tokens)
    whole = filled(case, k, v)
    singles = range(max(0, case.tokens - case.scheme.recent.tokens - 70 if case.scheme.recent else 70), case.tokens)
    require_same("one by one", filled(case, k, v, [n for n in singles if n]), whole)
    cuts = [case.random.randint(0, case.tokens) for _ in range(5)]
    require_same(f"cut at {sorted(cuts)}", filled(case, k, v, cuts), whole)


@law("P28", lambda scheme: scheme.keys.rope is None, kinds=PLAIN)
def steps_in_place_are_appends(case: Case) -> None:
    """P28: tokens that come in place, by counts on the device alone, leave the same bytes, and their attention is the
    same.  Of the longest sequence a window is full on the way, where one ever is."""
    k, v = case.pair(case.tokens)
    flushed = [n for n in range(1, case.tokens - 1) if any(w.packed(n + 1) > w.packed(n) for w in _windows(case))]
    begin = max(0, flushed[-1] - 2) if flushed else max(0, case.tokens - STEPS)
    counts = (begin, *(case.random.randint(0, begin) for _ in range(case.batch - 1)))
    told, cache = new_cache(case, k, v), new_cache(case, k, v)
    for each in (told, cache):
        each.append(*(x[:, :, :begin].to(each.device) for x in (k, v)), counts=counts)
    static = StaticCache(cache, case.tokens)
    static.begin()
    softcap = 30.0 if case.shape.softcap else None
    for at in range(begin, min(begin + STEPS, case.tokens)):
        fresh = [x[:, :, at : at + 1].to(cache.device) for x in (k, v)]
        q = case.query(1, seed=at).to(cache.device)
        wanted = told.append_and_attend(q, *fresh, softcap=softcap)
        got = static.step(q, *fresh, softcap=softcap)
        for what, one, other in zip(("output", "log-sum-exp"), got, wanted, strict=True):
            close = 1e-3 * float(other.abs().max()) + 1e-6
            require_within(f"{what} of token {at}", one.cpu(), other.cpu(), close)
    static.settle()
    require_same("in place", cache, told)


def _windows(case: Case) -> list[Window]:
    return list(windows(case.scheme).values())


@law("P30", kinds=PLAIN)
def window_and_sinks_are_exact(case: Case) -> None:
    """P30: at every length the sinks and the tokens of the window are the input, and as many tokens are packed, decoded
    as the reference decodes them, as the definitions say."""
    k, v = case.pair(case.tokens)
    cache = new_cache(case, k, v)
    told = reference.Stream(case.scheme, params=case.params(k, v))
    edges = sorted({0, case.tokens, *(case.random.randint(0, case.tokens) for _ in range(4))})
    for begin, end in zip(edges, edges[1:], strict=False):
        chunk = k[:, :, begin:end], v[:, :, begin:end]
        grow(cache, *chunk)
        told.append(*chunk)
        for side in SIDES:
            first, last = told.packed(side)
            require(cache.packed(side) == (last - first,) * case.batch, f"packed {side}: {cache.packed(side)} of {end}")
            held = told.rows(side).to(k.dtype)
            require_equal(f"{side} after {end} tokens", cache.dense(side), held)


@law("P31", kinds=("normal",))
def bytes_are_counted(case: Case) -> None:
    """P31: a page is as large as the reference's, nbytes the pages, the exact rows and what is kept beside them."""
    k, v = case.pair(case.tokens)
    cache = filled(case, k, v)
    size = case.kernels.page_bytes
    require(size == reference.page_bytes(case.scheme, case.shape), f"a page has {size} bytes")
    require(case.kernels.page_tokens == reference.page_tokens(case.scheme), "tokens of a page")
    most = max(max(cache.packed(side)) for side in SIDES)
    pages = 1 + case.batch * -(-most // case.kernels.page_tokens)
    state = cache.state()
    rows = sum(x.numel() * x.element_size() for x in (state.key_rows, state.value_rows))
    rest = cache.nbytes - pages * size - rows
    require(0 < rest <= 4096 + 64 * case.batch * (1 + state.table.shape[1]), f"{rest} bytes beside pages and rows")
    require(cache.pool.bytes.dtype == torch.uint8, "pages are bytes")


@law("P32", kinds=MODEST)
def steps_attend_to_what_is_held(case: Case) -> None:
    """P32, P36: a step sees its own tokens exactly and older ones as they were held (prefill "exact"), or all as they
    are held (prefill "stored"), whatever chunk it brings."""
    k, v = case.pair(case.tokens)
    cache = new_cache(case, k, v)
    at, params = 0, case.params(k, v)
    while at < case.tokens:
        count = min(case.random.choice((1, 1, 2, 17, case.tokens)), case.tokens - at)
        chunk = [x[:, :, at : at + count].to(cache.device) for x in (k, v)]
        q, seen = case.query(count, seed=at), at if case.scheme.prefill == "exact" else at + count
        at += count
        softcap = 30.0 if case.shape.softcap else None
        out, lse = cache.append_and_attend(q.to(cache.device), *chunk, softcap=softcap)
        options = {"softcap": softcap} if softcap else {}
        step = Step(q, k[:, :, :at], v[:, :, :at], (at,) * case.batch, (seen,) * case.batch, params, options)
        require_close(case, step, (out.cpu(), lse.cpu()))
        skipped = min(case.random.randint(0, 60), case.tokens - at)
        grow(cache, k[:, :, at : at + skipped], v[:, :, at : at + skipped])
        at += skipped


@law("P35", kinds=PLAIN)
def cropping_a_draft_loses_nothing(case: Case) -> None:
    """P35: tokens recorded as a draft and cropped leave the cache as if they had never come."""
    k, v = case.pair(case.tokens)
    junk = case.pair(24, seed=9)
    kept = case.random.randint(0, case.tokens)
    cache = new_cache(case, k, v)
    grow(cache, k[:, :, :kept], v[:, :, :kept])
    cache.record(24)
    grow(cache, *junk)
    cache.crop(kept, requantize=False)
    grow(cache, k[:, :, kept:], v[:, :, kept:])
    require(cache.requantized == 0, f"{cache.requantized} tokens were quantized twice")
    require_same(f"cropped to {kept}", cache, filled(case, k, v), pages=False)


@law("P35", kinds=PLAIN)
def sequences_move_whole(case: Case) -> None:
    """P35: reordered, repeated and forked sequences hold what they held, and growing one leaves its copies alone."""
    k, v = case.pair(case.tokens)
    cut = case.random.randint(0, case.tokens)
    order = [case.random.randrange(case.batch) for _ in range(case.batch + 1)]
    cache = new_cache(case, k, v)
    grow(cache, k[:, :, :cut], v[:, :, :cut])
    twin = cache.fork()
    cache.reorder(order)
    grow(cache, k[order, :, cut:], v[order, :, cut:])
    params = case.params(k, v)
    for what, got, rows, end in (("reordered", cache, order, case.tokens), ("fork", twin, range(case.batch), cut)):
        told = reference.Stream(case.scheme, params=params)
        told.append(k[list(rows), :, :end], v[list(rows), :, :end])
        for side in SIDES:
            require_equal(f"{what} {side}", got.dense(side), told.rows(side).to(k.dtype))


@law("P33", kinds=PLAIN)
def a_saved_cache_comes_back(case: Case) -> None:
    """P33: saved and loaded, a cache is the same and grows to the same."""
    k, v = case.pair(case.tokens)
    cut = case.random.randint(0, case.tokens)
    cache = new_cache(case, k, v)
    grow(cache, k[:, :, :cut], v[:, :, :cut])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        options = {"params": cache.params, "capacity": cache.capacity, "device": cache.device}
        loaded = QuantizedCache.load(path, case.kernels, **options)
    require_same("loaded", loaded, cache)
    for each in (cache, loaded):
        grow(each, k[:, :, cut:], v[:, :, cut:])
    require_same("loaded and grown", loaded, cache)
