"""Sequences cut into segments, and what attention over all of them must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvdsl.inputs import DTYPES
from kvdsl.kernels import Form, Segment, attend_segments
from kvdsl.reference.attention import softmax_rows
from kvdsl.scheme import SIDES
from kvdsl.testing import Case
from kvdsl.testing.attention import DRAWS, Step, coded, products_of, rounding_of, score_sizes, score_spread
from kvdsl.testing.cases import require, require_equal, require_within
from kvdsl.testing.driving import device_of, ready
from kvdsl.testing.halves import HALF, eager, normal_form
from kvdsl.testing.products import mapped_back, mapped_query


class Cut(NamedTuple):
    """A segment as its scheme, what it holds, and its state's `ahead`."""

    case: Case
    step: Step
    ahead: int = 0

    def segment(self) -> Segment:
        kernels = self.case.kernels
        state = replace(self.step.state(self.case), ahead=self.ahead)
        return Segment(kernels, state, ready(kernels, self.step.params))


def cut(
    cases: Sequence[Case], queries: int, cuts: Sequence[Sequence[int]] | None = None, window: int | None = None
) -> list[Cut]:
    """A step of the first case's numbers, a segment of neighbouring tokens for every case; the last one holds the
    queries' tokens.  `cuts`: where the segments of each sequence end, but for the last; at random if not given, in
    sequences of random lengths.  Under a window the queries stand where they stand in the whole sequence."""
    first = cases[0]
    tokens = max(first.tokens, queries)
    k, v = first.pair(tokens)
    lengths = [tokens] * first.batch
    if cuts is None:
        lengths = [tokens, *(first.random.randint(queries, tokens) for _ in range(first.batch - 1))]
        cuts = [sorted(first.random.randint(0, n - queries) for _ in cases[1:]) for n in lengths]
    options = {"window": window} | ({"softcap": 30.0} if first.shape.softcap else {})
    bounds = [(0, *mine, n) for mine, n in zip(cuts, lengths, strict=True)]
    found = []
    for i, case in enumerate(cases):
        starts, ends = [mine[i] for mine in bounds], [mine[i + 1] for mine in bounds]
        held = tuple(end - start for start, end in zip(starts, ends, strict=True))
        keys, values = (_stretch(x, starts, ends) for x in (k, v))
        last = i == len(cases) - 1
        fresh = queries if last and case.scheme.prefill == "exact" else 0
        seen = tuple(n - fresh for n in held)
        step = Step(first.query(queries), keys, values, held, seen, case.params(k, v), options)
        found.append(Cut(case, step, 0 if last else queries if window is None else lengths[0] - ends[0]))
    return found


def _stretch(x: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Tokens [starts_b, ends_b) of x (B, H, T, D), from the first place on; behind them NaN."""
    held = [end - start for start, end in zip(starts, ends, strict=True)]
    found = x.new_full((*x.shape[:2], max(1, *held), x.shape[3]), math.nan)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        found[b, :, : end - start] = x[b, :, start:end]
    return found


def attended(cuts: Sequence[Cut], splits: int | None = None, form: Form | None = None) -> tuple[Tensor, Tensor]:
    """What the kernels give, on the CPU."""
    query = cuts[0].step.q.to(device_of(cuts[0].case.kernels))
    out, lse = attend_segments(query, [one.segment() for one in cuts], splits, form)
    return out.cpu(), lse.cpu()


def require_union(cuts: Sequence[Cut], got: tuple[Tensor, Tensor]) -> None:
    """The three-way rule of `kvdsl.testing.attention` for the tokens of all segments, the queries' own the last."""
    for b in range(cuts[0].case.batch):
        _require_sequence([one for one in cuts if one.step.lengths[b]], b, got[0][b : b + 1], got[1][b : b + 1])


def _require_sequence(cuts: Sequence[Cut], b: int, out: Tensor, lse: Tensor) -> None:
    case, step = cuts[0].case, cuts[0].step
    q, scaling = step.q[b : b + 1], case.shape.head_dim**-0.5
    (keys, key_parts), (values, value_parts) = (
        zip(*(coded(one.case, one.step, b, side) for one in cuts), strict=True) for side in SIDES
    )
    held, parts = (torch.cat(x, 2) for x in (keys, values))
    options: dict[str, Any] = {
        "sliding": step.options.get("window"),
        "start": None,
        "softcap": step.options.get("softcap"),
        "scale": None,
    }
    want, want_lse = softmax_rows(q, held, parts, **options)
    mapped = [mapped_query(one.case.scheme.keys, q, case.shape.kv_heads, one.step.params) for one in cuts]
    back = [
        mapped_back(one.case.scheme.values, part, case.shape.head_dim, one.step.params)
        for one, part in zip(cuts, value_parts, strict=True)
    ]
    given = q, torch.cat(mapped, -1), held, _diagonal(key_parts), parts, torch.cat(back, 2)
    found = [eager(q, held, parts, DTYPES[case.shape.dtype], **options), normal_form(*given, **options)]
    spread = torch.cat([score_spread(one.case, one.step, b) for one in cuts], -1)
    for i in range(DRAWS):
        source = torch.Generator().manual_seed(case.seed * DRAWS + i)
        found.append(normal_form(*given, drawn=(source, spread), **options))
    plain = want
    if any(one.case.scheme.queries for one in cuts):  # arithmetic is as far off as with queries as they are
        raw = torch.cat([products_of(one.case, one.step, b) for one in cuts], -1)
        want, want_lse = softmax_rows(q, held, parts, raw=raw, **options)
    error = max(float((one - plain).abs().nan_to_num(0.0).max()) for one in found)
    require_within(f"output of sequence {b}", out, want, 2 * error + 1e-3 * float(want.abs().max()) + 1e-7)
    empty = want_lse.isinf()
    require(bool((lse[empty] == -math.inf).all()), "log-sum-exp of a query that sees nothing is not -inf")
    require_equal("output of a query that sees nothing", out[empty], torch.zeros_like(out[empty]))
    errors = [sizes @ size.transpose(2, 3) for sizes, size in (score_sizes(one.case, one.step, b) for one in cuts)]
    limit = torch.cat(errors, -1).amax(-1) * scaling * HALF + rounding_of(want_lse)
    require_within(f"log-sum-exp of sequence {b}", lse[~empty], want_lse[~empty], limit[~empty])


def _diagonal(parts: Sequence[Tensor]) -> Tensor:
    """Factors (1, H, T_i, M_i) of neighbouring tokens, each of products with a vector of its own, as those of products
    with all these vectors one behind the other: (1, H, sum T, sum M)."""
    wide = sum(part.shape[3] for part in parts)
    rows, before = [], 0
    for part in parts:
        rows.append(torch.nn.functional.pad(part, (before, wide - before - part.shape[3])))
        before += part.shape[3]
    return torch.cat(rows, 2)
