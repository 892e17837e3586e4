"""Laws of attention over packed tokens, against float64 attention over what the reference says the cache holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvdsl import reference
from kvdsl.inputs import DTYPES
from kvdsl.kernels import AttentionState, Form, Params, Side
from kvdsl.reference.attention import softmax_rows
from kvdsl.reference.quantize import level_count
from kvdsl.reference.queries import products
from kvdsl.reference.timeline import packed_tokens
from kvdsl.scheme import SIDES, Float, Scheme, Store, Uniform

from .bounds import blocks_of, spread
from .cases import Case, law, require, require_equal, require_within, static
from .data import MODEST
from .driving import USUAL, Ends, Poison, attention_state, device_of, packed, ready
from .halves import HALF, eager, normal_form, seen_by
from .products import mapped_back, mapped_query, product_errors, rounded_sizes, sides_of, sizes_of
from .rotary import roundings

DRAWS = 6  # of rounding errors, beside the one that a query has


@dataclass(frozen=True)
class Step:
    """One attention step: sequence b has lengths_b tokens, packed as after seen_b of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    seen: tuple[int, ...]
    params: Params
    options: dict[str, Any]

    def state(self, case: Case, poison: Poison = USUAL) -> AttentionState:
        return attention_state(
            case.kernels, self.k, self.v, self.lengths, self.seen, params=self.params, poison=poison, **self.options
        )


def step_of(case: Case, queries: int, *, ragged: bool = True, **options: Any) -> Step:
    """A step at the end of the case's tokens; in a ragged batch the other sequences are shorter."""
    tokens = max(case.tokens, queries)
    k, v = case.pair(tokens)
    shorter = [case.random.randint(queries, tokens) if ragged else tokens for _ in range(case.batch - 1)]
    lengths = (tokens, *shorter)
    fresh = queries if case.scheme.prefill == "exact" else 0
    params = case.params(k, v)
    if case.shape.softcap:
        options = {"softcap": 30.0, **options}
    return Step(case.query(queries), k, v, lengths, tuple(n - fresh for n in lengths), params, options)


def attend(
    case: Case, step: Step, splits: int | None = None, poison: Poison = USUAL, form: Form | None = None
) -> tuple[Tensor, Tensor]:
    """The kernels' output and log-sum-exp, on the CPU."""
    device = device_of(case.kernels)
    q = step.q.to(device)
    out, lse = case.kernels.attend(q, step.state(case, poison), ready(case.kernels, step.params), splits, form)
    return out.cpu(), lse.cpu()


def _options(step: Step, b: int) -> dict[str, Any]:
    start: Sequence[int] | None = step.options.get("start")
    return {
        "sliding": step.options.get("window"),
        "start": None if start is None else start[b],
        "softcap": step.options.get("softcap"),
        "scale": step.options.get("scaling"),
    }


def truth(case: Case, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """(output, log-sum-exp) in float64, and what attention in half precision may be off by: output-shaped."""
    found = []
    for b in range(case.batch):
        (keys, key_part), (values, value_part) = (coded(case, step, b, side) for side in SIDES)
        q, options = step.q[b : b + 1], _options(step, b)
        out, lse = softmax_rows(q, keys, values, **options)
        plain = eager(q, keys, values, DTYPES[case.shape.dtype], **options)
        mapped = mapped_query(case.scheme.keys, q, case.shape.kv_heads, step.params)
        value_part = mapped_back(case.scheme.side("values"), value_part, values.shape[3], step.params)
        parts = keys, key_part, values, value_part
        factored = [normal_form(q, mapped, *parts, **options)]
        spread_of = score_spread(case, step, b)
        for i in range(DRAWS):
            source = torch.Generator().manual_seed(case.seed * DRAWS + i)
            factored.append(normal_form(q, mapped, *parts, drawn=(source, spread_of), **options))
        error = torch.stack([(one - out).abs() for one in (plain, *factored)]).amax(0)
        if case.scheme.queries is not None:  # arithmetic is as far off as with queries as they are
            out, lse = softmax_rows(q, keys, values, raw=products_of(case, step, b), **options)
        found.append((out, lse, error))
    out, lse, error = (torch.cat(rows) for rows in zip(*found, strict=True))
    return out, lse, error


def weighed_parts(case: Case, step: Step) -> Tensor:
    """The sizes of what weights multiply, weighed and added up: float64 (B, Hq, Q, D)."""
    found = []
    for b in range(case.batch):
        (keys, _), (values, part) = (coded(case, step, b, side) for side in SIDES)
        part = mapped_back(case.scheme.side("values"), part, values.shape[3], step.params)
        raw = products_of(case, step, b)
        found.append(softmax_rows(step.q[b : b + 1], keys, part.abs(), raw=raw, **_options(step, b))[0])
    return torch.cat(found)


def products_of(case: Case, step: Step, b: int) -> Tensor:
    """q.k^ of sequence b, float64 (1, Hq, Q, length), of packed keys with what queries are rounded to."""
    span, q = packed_tokens(case.scheme, "keys", step.seen[b]), step.q[b : b + 1]
    return products(case.scheme, q, coded(case, step, b, "keys")[0], span, step.params)


def coded(case: Case, step: Step, b: int, side: Side) -> tuple[Tensor, Tensor]:
    """What the cache holds of sequence b, float64 (1, H, length, D), and the factors of products with it."""
    x = (step.k if side == "keys" else step.v)[b : b + 1, :, : step.lengths[b]]
    return sides_of(case.scheme.side(side), x, packed_tokens(case.scheme, side, step.seen[b]), step.params, side)


def score_errors(case: Case, step: Step, unit: float | None = None) -> Tensor:
    """How far a scaled score of a visible token may be off, the most of each query: float64 (B, Hq, Q).

    scaling * sum_d |q_d| A_d * unit, with A_d the largest size in the block of that number, or its own where it is
    exact.  The default unit is that of operands rounded to float16, 2^-11 of each: a code that is not centred counts
    s*c <= 2 A_d, and of an exact or decoded number the query and the number are rounded; or more numbers, `roundings`.
    A softcap has slopes up to 1.
    """
    unit = HALF / 2 * roundings(case.scheme.keys, case.kernels.backend) if unit is None else unit
    scaling = step.options.get("scaling")
    scaling = case.shape.head_dim**-0.5 if scaling is None else scaling
    found = []
    for b, length in enumerate(step.lengths):
        options = _options(step, b)
        sizes, size = score_sizes(case, step, b)
        error = sizes @ size.transpose(2, 3)
        seen = seen_by(step.q.shape[2], length, options["sliding"], options["start"])
        found.append(error.masked_fill(~seen, 0.0).amax(-1) * scaling * unit)
    return torch.cat(found)


def score_sizes(case: Case, step: Step, b: int) -> tuple[Tensor, Tensor]:
    """What the queries of sequence b, (1, Hq, Q, M), and its keys, (1, Hq, length, M), count in errors of products."""
    span = packed_tokens(case.scheme, "keys", step.seen[b])
    k = step.k[b : b + 1, :, : step.lengths[b]]
    size = sizes_of(case.scheme.keys, k, span, step.params, "keys", _largest).repeat_interleave(case.shape.group, 1)
    return rounded_sizes(case.scheme, step.q[b : b + 1], case.shape.kv_heads, step.params), size


def score_spread(case: Case, step: Step, b: int) -> Tensor:
    """The standard deviation of q.k^ of sequence b, float64 (1, Hq, Q, length): of each product of two numbers that are
    rounded by up to 2^-11, at any place alike, it is 2^-11 sqrt(2/3) of its size, of six sqrt(2)."""
    sizes, size = score_sizes(case, step, b)
    count = roundings(case.scheme.keys, case.kernels.backend)
    return (sizes.square() @ size.square().transpose(2, 3) * (count / 3)).sqrt() * (HALF / 2)


def require_close(case: Case, step: Step, got: tuple[Tensor, Tensor]) -> None:
    """The three-way rule: at most twice the largest error of attention in half precision (eager in the model's
    dtype, or by the kernels' own form) plus 1e-3 of the largest output.  The log-sum-exp moves by no more than a score
    of it may (`score_errors`), and by 1e-5 of its size for sums in float32."""
    out, lse, error = truth(case, step)
    limit = 2 * float(error.nan_to_num(0.0).max()) + 1e-3 * float(out.abs().max()) + 1e-7
    require_within("output", got[0], out, limit)
    empty = lse.isinf()
    require(bool((got[1][empty] == -math.inf).all()), "log-sum-exp of a query that sees nothing is not -inf")
    require_equal("output of a query that sees nothing", got[0][empty], torch.zeros_like(got[0][empty]))
    limits = score_errors(case, step) + rounding_of(lse)
    require_within("log-sum-exp", got[1][~empty], lse[~empty], limits[~empty])


def rounding_of(lse: Tensor) -> Tensor:
    """What sums in float32 may add to the error of a log-sum-exp: 1e-5 of its size."""
    return 1e-5 * lse.double().abs().clamp(min=1.0)


# ---- laws


@law("P32", kinds=MODEST)
def decode_is_attention(case: Case) -> None:
    """P32: one query over packed and exact tokens, within the three-way rule of float64 attention over what is held."""
    step = step_of(case, 1)
    require_close(case, step, attend(case, step))


@law("P32", kinds=MODEST)
def extend_is_attention(case: Case) -> None:
    """P32: several queries in one step, causal among themselves, within the three-way rule."""
    step = step_of(case, case.random.choice((2, 3, 5, 17)))
    require_close(case, step, attend(case, step))


@law("P32", kinds=MODEST)
def decoding_once_is_attention(case: Case) -> None:
    """P32, P29: many queries over tokens that are decoded once, from a first visible one on and within a window or not,
    within the three-way rule; whatever stands in places that hold no token, to the bit."""
    queries = case.random.choice((1, 7, 33, 70))
    window = case.random.choice((None, None, 5, 40, max(case.tokens, queries)))
    step = step_of(case, queries, window=window)
    if case.random.random() < 0.5:
        step = replace(step, options={**step.options, "start": [case.random.randint(0, n) for n in step.lengths]})
    got = attend(case, step, form="dense")
    require_close(case, step, got)
    if case.random.random() < 0.2:
        other = attend(case, step, poison=Poison(0xFF, math.inf, spare=9, seed=5), form="dense")
        require_equal("output with another poison, in other places", other[0], got[0])


@law("P29", kinds=MODEST)
def windows_and_padding_are_seen(case: Case) -> None:
    """P29: a sliding window and a first visible token, for one query and several; queries that see nothing give 0."""
    queries = case.random.choice((1, 3))
    tokens = max(case.tokens, queries)
    window = case.random.choice((None, 1, 7, 31, 64, tokens, 3 * tokens))
    step = step_of(case, queries, window=window)
    start = [case.random.randint(0, n) for n in step.lengths]
    step = replace(step, options={**step.options, "start": start})
    require_close(case, step, attend(case, step))


@law("P12", kinds=MODEST)
def splits_do_not_matter(case: Case) -> None:
    """P12: however many programs share a sequence, the output is the same up to float16 rounding of the weights, which
    multiply the codes under their scales, not the decoded numbers; the log-sum-exp up to float32 rounding."""
    queries = case.random.choice((1, 2))
    step = step_of(case, queries)
    unit = float(torch.finfo(step.q.dtype).eps)
    one, lse = attend(case, step, 1)
    sizes = weighed_parts(case, step).clamp(min=float(one.abs().max()))
    for splits in (2, case.random.randint(3, 5)):
        other, other_lse = attend(case, step, splits)
        require_within(f"output of {splits} splits", other, one.double(), max(unit, HALF) * sizes + 1e-7)
        require_within(
            f"log-sum-exp of {splits} splits", other_lse, lse.double(), 1e-5 * max(1.0, float(lse.abs().max()))
        )


@law("P12", kinds=MODEST)
def parts_merge_by_their_sums(case: Case) -> None:
    """P12: attention over two parts of a sequence, merged by their log-sum-exps, is attention over the whole,
    within the three-way rule of each: a page that one of them cuts may be read by other arithmetic.  Log-sum-exps
    differ by at most what a score of the whole and one of a part are off."""
    step = step_of(case, 1, ragged=False)
    out, lse = attend(case, step)
    cut = case.random.randint(0, case.tokens)
    late = replace(step, options={**step.options, "start": [cut] * case.batch})
    early = replace(step, lengths=(cut,) * case.batch, seen=tuple(min(n, cut) for n in step.seen))
    parts = [attend(case, late)]
    if cut > 0 and _same_packed(case, step.seen[0], early.seen[0], cut):
        parts.append(attend(case, early))
    elif cut > 0:
        return
    total = torch.logsumexp(torch.stack([part[1].double() for part in parts]), 0)
    merged = sum(
        (p[0].double() * (p[1].double() - total).exp().nan_to_num(0.0)[..., None] for p in parts), torch.zeros(())
    )
    asked = (step, late, early)[: 1 + len(parts)]
    limit = sum(2 * float(truth(case, one)[2].nan_to_num(0.0).max()) for one in asked)
    limit += 2e-3 * max(float(part[0].abs().max()) for part in parts) + 1e-5
    require_within("merged output", merged, out.double(), limit)
    errors = torch.stack([score_errors(case, one) for one in asked])
    require_within("merged log-sum-exp", total, lse.double(), errors[0] + errors.amax(0) + rounding_of(lse))


def _same_packed(case: Case, seen: int, early: int, cut: int) -> bool:
    """Whether the first `cut` tokens are held alike after `seen` and after `early` tokens."""
    ends = [
        (packed_tokens(case.scheme, s, seen)[1], packed_tokens(case.scheme, s, early)[1]) for s in ("keys", "values")
    ]
    return all(min(long, cut) == min(short, cut) for long, short in ends)


@law("P29", kinds=("normal", "outlier_channel"))
def poison_does_not_matter(case: Case) -> None:
    """P29: whatever stands in places that hold no token (pages, rows, padding), the result is the same to the bit."""
    step = step_of(case, case.random.choice((1, 3)))
    one = attend(case, step, 2, Poison(0x5A, math.nan, seed=0))
    other = attend(case, step, 2, Poison(0xFF, -65504.0, seed=0))
    moved_about = attend(case, step, 2, Poison(0x00, math.inf, spare=9, seed=5))
    for name, got in (("another poison", other), ("other places", moved_about)):
        require_equal(f"output with {name}", got[0], one[0])
        require_equal(f"log-sum-exp with {name}", got[1], one[1])


@law("P29", kinds=("normal", "outlier_channel"))
def neighbours_do_not_reach_attention(case: Case) -> None:
    """P29: a sequence of a ragged batch gets what it gets alone, to the bit where the number of splits is given.

    Else the torch kernels multiply a whole batch at once, and how a float32 product of matrices is summed depends on
    their sizes.  In another order a sum of n terms changes by at most 2n*2^-24 of their sizes, and the terms of a
    score, q*s*c and q*o, are of sizes up to 3 |q_d| A_d together: so log-sum-exps may differ by d = 6 (D + 8) 2^-24 *
    scaling * sum_d |q_d| A_d, and by the sum of the weights; outputs by 2 d of the largest number and by rounding."""
    step = step_of(case, case.random.choice((1, 3)))
    together, loose = attend(case, step, 2), attend(case, step)
    dim = case.shape.head_dim
    for b in range(case.batch):
        n = step.lengths[b]
        q, k, v = step.q[b : b + 1], step.k[b : b + 1, :, :n], step.v[b : b + 1, :, :n]
        own = replace(step, q=q, k=k, v=v, lengths=(n,), seen=(step.seen[b],))
        out, lse = attend(case, own, 2)
        require_equal(f"output of sequence {b}", together[0][b : b + 1], out)
        require_equal(f"log-sum-exp of sequence {b}", together[1][b : b + 1], lse)
        if case.kernels.backend == "triton":
            continue
        pairs = (f"output of sequence {b}", loose[0], out), (f"log-sum-exp of sequence {b}", loose[1], lse)
        moved_by = score_errors(case, own, 6 * (dim + 8) * 2.0**-24)
        summed = 2 * (n + 8) * 2.0**-24
        unit = float(torch.finfo(out.dtype).eps)
        largest = float(coded(case, own, 0, "values")[0].abs().max())
        limits = (
            (2 * moved_by[..., None] + 4 * summed) * largest + unit * out.double().abs(),
            moved_by + summed + 2.0**-22 * lse.double().abs(),
        )
        for (name, got, want), limit in zip(pairs, limits, strict=True):
            require_within(name, got[b : b + 1], want, limit)


@law("P36", kinds=("normal",))
def chunks_attend_like_single_steps(case: Case) -> None:
    """P36: several queries in one step get what they get one by one, where no token is packed between them."""
    queries = case.random.choice((2, 4))
    step = step_of(case, queries, ragged=False)
    step = replace(step, seen=tuple(n - queries for n in step.lengths))
    together, _ = attend(case, step)
    for i in range(queries):
        n = step.lengths[0] - queries + i + 1
        one = replace(step, q=step.q[:, :, i : i + 1].contiguous(), lengths=(n,) * case.batch)
        single, _ = attend(case, one)
        unit = float(torch.finfo(step.q.dtype).eps)
        limit = 2 * max(unit, HALF) * float(single.abs().max()) + 1e-7
        require_within(f"output of query {i}", together[:, :, i : i + 1], single, limit)


@law("P32", kinds=MODEST)
def scores_are_products(case: Case) -> None:
    """P32: scores of packed tokens are q.k^, of q rounded if queries are, up to what `product_errors` says."""
    tokens = case.whole
    k, v = case.pair(tokens)
    params = case.params(k, v)
    keys, values = (torch.cat([x.new_zeros(*x.shape[:2], case.sinks, x.shape[3]), x], 2) for x in (k, v))
    ends: Ends = {"keys": [tokens] * case.batch, "values": [0] * case.batch}
    pages = packed(case.kernels, keys, values, ends, params)
    q, device = case.query(2), device_of(case.kernels)
    got = case.kernels.scores(q.to(device), pages.pool, pages.table, tokens, ready(case.kernels, params)).cpu()
    store, group = case.scheme.keys, case.shape.group
    decoded = reference.quantize(store, k, params, "keys", case.sinks).decoded
    held = decoded.repeat_interleave(group, 1).transpose(2, 3)
    size = sizes_of(store, k, (0, tokens), params, "keys", _largest, case.sinks).repeat_interleave(group, 1)
    sizes = rounded_sizes(case.scheme, q, case.shape.kv_heads, params)
    limit = product_errors(store, case.kernels.backend, q, held, sizes, size) + 1e-30
    require_within("scores", got, products(case.scheme, q, decoded, (0, tokens), params), limit)


def _largest(store: Store, k: Tensor, params: Params) -> Tensor:
    """The largest size in the block of each number, or among its levels where these are given: (B, H, T, D)."""
    if store.measure is None:
        return k.abs()
    if not static(store):
        return spread(store, blocks_of(store, k.abs()).amax((2, 4, 6)), k)
    given = params["keys.scale"].double().cpu()
    step, low = (given[0], given[1]) if store.measure.range in ("minmax", "minmax_zero") else (given, None)
    if not isinstance(store.code, Uniform):  # what its levels reach is among the decoded numbers
        return spread(store, (step.abs() if low is None else step.abs() + low.abs())[None, :, None], k)
    reach = step * level_count(store)
    low = -reach / 2 - step / 2 if low is None else low
    return spread(store, torch.maximum(low.abs(), (low + reach).abs())[None, :, None], k)


def _plain(scheme: Scheme) -> bool:
    """Whether numbers are stored as they are: those of a map, and angles, are rounded to float16 once more."""
    sides = (scheme.keys, scheme.values)
    plain = all(isinstance(side.code, Float) and side.code.plain and not side.turned for side in sides)
    return plain and scheme.queries is None


@law("P32", _plain, MODEST)
def plain_floats_are_plain_attention(case: Case) -> None:
    """P32: a scheme of floats is attention over the numbers themselves."""
    if case.shape.dtype != "fp16":  # float16 pages round other dtypes
        case = replace(case, shape=replace(case.shape, dtype="fp16"))
    step = step_of(case, case.random.choice((1, 3)), ragged=False)
    got, _ = attend(case, step)
    want, _ = softmax_rows(step.q, step.k.double(), step.v.double(), softcap=step.options.get("softcap"))
    plain = eager(
        step.q, step.k, step.v, DTYPES[case.shape.dtype], sliding=None, start=None,
        softcap=step.options.get("softcap"), scale=None,
    )  # fmt: skip
    error = float((plain - want).abs().max())
    require_within("output", got, want, 2 * error + 1e-3 * float(want.abs().max()) + 1e-7)
