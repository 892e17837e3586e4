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
from kvdsl.kernels import AttentionState, Params, Side
from kvdsl.levels import table
from kvdsl.reference.attention import softmax_rows
from kvdsl.reference.quantize import quantize
from kvdsl.reference.timeline import contents, packed_tokens
from kvdsl.scheme import SIDES, Codebook, Float, Scheme, Store, Uniform

from .bounds import blocks_of, second, spread
from .cases import Case, law, require, require_equal, require_within, static
from .data import MODEST
from .driving import USUAL, Ends, Poison, attention_state, device_of, moved, packed

HALF = 2.0**-10  # twice the rounding unit of float16


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


def attend(case: Case, step: Step, splits: int | None = None, poison: Poison = USUAL) -> tuple[Tensor, Tensor]:
    """The kernels' output and log-sum-exp, on the CPU."""
    device = device_of(case.kernels)
    q = step.q.to(device)
    out, lse = case.kernels.attend(q, step.state(case, poison), moved(step.params, device), splits)
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
        factored = normal_form(q, keys, key_part, values, value_part, **options)
        found.append((out, lse, torch.maximum((plain - out).abs(), (factored - out).abs())))
    out, lse, error = (torch.cat(rows) for rows in zip(*found, strict=True))
    return out, lse, error


def coded(case: Case, step: Step, b: int, side: Side) -> tuple[Tensor, Tensor]:
    """What the cache holds of sequence b, float64 (1, H, length, D), and the part of it that is code (or level) times
    scale: what remains of a packed number without its offset, and all of an exact one.  Evenly spaced levels are codes,
    counted from the lowest."""
    store, params = case.scheme.side(side), step.params
    x = (step.k if side == "keys" else step.v)[b : b + 1, :, : step.lengths[b]]
    first, end = packed_tokens(case.scheme, side, step.seen[b])
    whole = contents(store, x, (first, end), params, side)
    part = whole.clone()
    if end > first and store.measure is not None:
        given = x[:, :, first:end]
        numbers = quantize(store, given, params, side)
        assert numbers.codes is not None and numbers.scale is not None
        scale = spread(store, numbers.scale * second(store, params, side), given)
        if isinstance(store.code, Uniform):
            part[:, :, first:end] = numbers.codes * scale
        else:
            coded = numbers.coded
            if numbers.offset is not None:
                coded = coded - spread(store, numbers.offset * second(store, params, side), given)
            even = _step(store)
            part[:, :, first:end] = coded if even is None else numbers.codes * scale * even
    return whole, part


def _step(store: Store) -> float | None:
    """The step of evenly spaced levels of a table."""
    levels = store.code.levels if isinstance(store.code, Codebook) else ()
    if isinstance(levels, str):
        return 2 * table(store.code, 128)[1] if levels != "calibrated" and store.code.bits == 1 else None  # type: ignore
    steps = {high - low for low, high in zip(levels, levels[1:], strict=False)}
    return steps.pop() if len(steps) == 1 else None


def _seen(queries: int, tokens: int, sliding: int | None, start: int | None) -> Tensor:
    """Which tokens each query sees: bool (queries, tokens)."""
    position = torch.arange(tokens - queries, tokens)[:, None]
    token = torch.arange(tokens)[None]
    seen = (token <= position) & (token >= (start or 0))
    return seen if sliding is None else seen & (token > position - sliding)


def normal_form(
    q: Tensor, keys: Tensor, key_part: Tensor, values: Tensor, value_part: Tensor, *, sliding: int | None,
    start: int | None, softcap: float | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention by the kernels' form q.k^ = s*(q.c) + o*sum(q), where the operands of products of codes are rounded to
    float16 and codes are not centred: float64 but for these two roundings."""
    group, factor = q.shape[1] // keys.shape[1], (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    exact = q.double()
    rounded = (exact * factor).to(torch.float16).double() / factor
    held, part = (x.repeat_interleave(group, 1).transpose(2, 3) for x in (keys, key_part))
    scores = (exact @ held + (rounded - exact) @ part) * (factor / math.log2(math.e))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shares = scores.masked_fill(~_seen(q.shape[2], keys.shape[2], sliding, start), -math.inf)
    shares = (shares - shares.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    weights = shares.to(torch.float16).double()
    held, part = (x.repeat_interleave(group, 1) for x in (values, value_part))
    return ((shares @ held + (weights - shares) @ part) / shares.sum(-1, keepdim=True)).nan_to_num(0.0)


def eager(
    q: Tensor, keys: Tensor, values: Tensor, dtype: torch.dtype, *, sliding: int | None, start: int | None,
    softcap: float | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention as a model without fused kernels does it: products in its dtype, softmax in float32, rounded."""
    group = q.shape[1] // keys.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (keys, values))
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _seen(q.shape[2], k.shape[2], sliding, start)
    shares = scores.float().masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return (shares.to(dtype) @ v).double()


def require_close(case: Case, step: Step, got: tuple[Tensor, Tensor]) -> None:
    """The three-way rule: at most twice the largest error of attention in half precision (eager in the model's
    dtype, or by the kernels' own form) plus 1e-3 of the largest output; the log-sum-exp within 4e-3 of its size."""
    out, lse, error = truth(case, step)
    limit = 2 * float(error.nan_to_num(0.0).max()) + 1e-3 * float(out.abs().max()) + 1e-7
    require_within("output", got[0], out, limit)
    empty = lse.isinf()
    require(bool((got[1][empty] == -math.inf).all()), "log-sum-exp of a query that sees nothing is not -inf")
    require_equal("output of a query that sees nothing", got[0][empty], torch.zeros_like(got[0][empty]))
    size = max(1.0, float(lse[~empty].abs().max())) if (~empty).any() else 1.0
    if case.kind not in ("outlier_channel",):
        require_within("log-sum-exp", got[1][~empty], lse[~empty], 4e-3 * size)


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
    """P12: however many programs share a sequence, the output is the same up to float16 rounding of the weights, the
    log-sum-exp up to float32 rounding."""
    queries = case.random.choice((1, 2))
    step = step_of(case, queries)
    unit = float(torch.finfo(step.q.dtype).eps)
    one, lse = attend(case, step, 1)
    for splits in (2, case.random.randint(3, 5)):
        other, other_lse = attend(case, step, splits)
        require_within(f"output of {splits} splits", other, one, max(unit, HALF) * float(one.abs().max()) + 1e-7)
        require_within(
            f"log-sum-exp of {splits} splits", other_lse, lse.double(), 1e-5 * max(1.0, float(lse.abs().max()))
        )


@law("P12", kinds=MODEST)
def parts_merge_by_their_sums(case: Case) -> None:
    """P12: attention over two parts of a sequence, merged by their log-sum-exps, is attention over the whole,
    within the three-way rule of each: a page that one of them cuts may be read by other arithmetic."""
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
    require_within("merged log-sum-exp", total, lse.double(), 4e-3 * max(1.0, float(lse.abs().max())))


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
    """P29: a sequence of a ragged batch gets what it gets alone, up to what another number of splits may change: how
    many programs share the exact tokens depends on the batch, and so do products of a whole batch."""
    step = step_of(case, case.random.choice((1, 3)))
    together = attend(case, step, 2)
    for b in range(case.batch):
        n = step.lengths[b]
        q, k, v = step.q[b : b + 1], step.k[b : b + 1, :, :n], step.v[b : b + 1, :, :n]
        out, lse = attend(case, replace(step, q=q, k=k, v=v, lengths=(n,), seen=(step.seen[b],)), 2)
        unit = max(HALF, float(torch.finfo(out.dtype).eps))
        require_within(f"output of sequence {b}", together[0][b : b + 1], out, unit * float(out.abs().max()) + 1e-6)
        size = max(1.0, float(lse.abs().max()))
        require_within(f"log-sum-exp of sequence {b}", together[1][b : b + 1], lse, 1e-5 * size)


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
    """P32: scores of packed tokens are q.k^, within float16 rounding of the query: codes are not centred, so an error
    counts by the largest number of the block."""
    tokens = case.whole
    k, v = case.pair(tokens)
    params = case.params(k, v)
    lead = torch.zeros(*k.shape[:2], case.sinks, k.shape[3], dtype=k.dtype)
    ends: Ends = {"keys": [tokens] * case.batch, "values": [0] * case.batch}
    pages = packed(case.kernels, torch.cat([lead, k], 2), torch.cat([lead, v], 2), ends, params)
    q, device = case.query(2), device_of(case.kernels)
    got = case.kernels.scores(q.to(device), pages.pool, pages.table, tokens, moved(params, device)).cpu()
    want = reference.scores(case.bare, q, k, window=False, params=params)
    largest = _largest(case.scheme.keys, k)
    if not isinstance(case.scheme.keys.code, Uniform):  # a level may lie farther out than every number
        held, _ = case.decoded(k, v, params)
        largest = torch.maximum(largest, held.double().abs())
    largest = largest.repeat_interleave(case.shape.group, 1)
    limit = q.double().abs() @ largest.transpose(2, 3) * 2.0**-10
    require_within("scores", got, want, limit + 1e-6)


def _largest(store: Store, k: Tensor) -> Tensor:
    """The largest size in the block of each number."""
    if store.measure is None or static(store):
        return k.double().abs().amax().expand(k.shape)
    return spread(store, blocks_of(store, k.double().abs()).amax((2, 4, 6)), k)


def _plain(scheme: Scheme) -> bool:
    return all(isinstance(side.code, Float) and side.code.plain for side in (scheme.keys, scheme.values))


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
