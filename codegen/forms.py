"""Which form of attention is the cheapest for so many queries: a model of what each costs, in microseconds on an H200.

    decode   a program has few query rows (8, or 16 of wide groups); more are passes, each of which reads every page
    extend   a program has 16 rows where registers allow, in one pass; 8, and passes of them, where one of decode has 4
    dense    packed tokens are decoded once into memory, and programs of many rows attend to what they are

A pass over packed codes is bound by instructions, not by bytes, from about 16 rows on, so decoding once wins where
there are rows enough to pay for a round trip of float16 numbers through memory.  Constants are of 2^21 tokens of a kv
head with head_dim 128 (8 x 8 x 32768), four query heads a kv head:

    measured  a pass of 8 rows: 62 to 68 us of `token4`, 66 to 76 of `token2`, 94 to 114 of `kivi4`, whose scales are
              of groups; one of 16 rows: 106 of `token4`, 253 of `kivi4` (two of them are slower than four of 8: 275
              and 803 against 259 and 400); decoding once 377 to 422, attention to what was decoded 340 to 355 for 4 to
              16 queries, 690 for 64, 2700 for 256
    assumed   codes that are decoded number by number take 250 us a pass, and a third more for 16 rows; 10 us to launch,
              20 where tokens are decoded first; maps that decoded numbers go through at the bytes, or the float64
              products, that they take

Only the order of sizes matters: where two forms cost the same, either is right.  One sequence is looked at, so that
what it gets does not depend on who else is in the batch.
"""

from __future__ import annotations

from bisect import bisect_left

from kvdsl.kernels import Form

from .launches import loop_bytes
from .placement import When
from .plan import DECODE_ROWS, WIDEST, Plan, SidePlan

TOKENS = 1 << 21  # tokens of a kv head that the constants are of
CHANNELS = 128
BANDWIDTH = 4.4e6  # bytes a microsecond, of pages
ROUND_TRIP = 3.4e6  # of decoding, and of reading what was decoded
PLAIN, GROUPED, DECODED = 68.0, 100.0, 250.0  # a pass of 8 rows: of codes, of groups with scales, number by number
TWICE = {PLAIN: 1.6, GROUPED: 2.5, DECODED: 1.3}  # what a pass of 16 rows takes of that
PRODUCTS = 400e6  # floating-point operations a microsecond, of float16
EXACT_PRODUCTS = 30e6  # of float32 and of float64
LAUNCH = 10.0
MOST = 4096  # queries that thresholds are looked for up to


def form(
    plan: Plan, queries: int, packed: int, exact: int = 0, window: int | None = None, *, once: bool = True
) -> Form:
    """The cheapest for one sequence with so many packed tokens and so many exact ones, of those that read pages unless
    tokens may be decoded `once`; one query is always decoded, and nothing is computed for it."""
    if queries == 1:
        return "decode"
    found, cost = pages_form(plan, queries, packed, exact, window)
    once = once and plan.shape.head_dim <= WIDEST  # of wider vectors a program has too few rows to be worth it
    return "dense" if once and dense_cost(plan, queries, packed, exact) < cost else found


def pages_form(plan: Plan, queries: int, packed: int, exact: int = 0, window: int | None = None) -> tuple[Form, float]:
    """(the cheapest form that reads pages, what it costs)."""
    few, many = (plan.rows(many=more) for more in (False, True))
    if queries * plan.shape.group > few and _in_passes(plan) == "extend":
        return "extend", pages_cost(plan, queries, packed, exact, window, many=True)
    decode = pages_cost(plan, queries, packed, exact, window, many=False)
    if few < queries * plan.shape.group <= many:
        extend = pages_cost(plan, queries, packed, exact, window, many=True)
        return ("extend", extend) if extend < decode else ("decode", decode)
    return "decode", decode


def _in_passes(plan: Plan) -> Form:
    """What reads pages for more queries than the programs of either have rows for."""
    return "extend" if plan.of_decode.abreast else "decode"


def pages_cost(
    plan: Plan, queries: int, packed: int, exact: int = 0, window: int | None = None, *, many: bool
) -> float:
    """Of the kernels that read pages, in passes of as many rows as a program has, of decode or (`many`) of extend."""
    if window is not None:
        packed = min(packed, window + queries)
    passes = -(-queries * plan.shape.group // plan.rows(many=many))
    return LAUNCH + passes * (packed * _pass(plan, many=many) + exact * _exact_bytes(plan) / BANDWIDTH)


def dense_cost(plan: Plan, queries: int, packed: int, exact: int = 0) -> float:
    """Of decoding all that is packed, and of attention to that and to the exact tokens."""
    operations, each = 4 * plan.shape.head_dim * plan.shape.kv_heads, plan.columns(many=False)
    rows = -(-queries * plan.shape.group // each) * each  # whole passes, so that more queries never turn it back
    rate = EXACT_PRODUCTS if _item(plan) == 4 else PRODUCTS
    attend = max(_exact_bytes(plan) / ROUND_TRIP, rows * operations / rate)
    return 2 * LAUNCH + packed * _decode(plan) + (packed + exact) * attend


def thresholds(plan: Plan, tokens: int) -> list[tuple[Form, int, int]]:
    """(form, the first and the last number of queries in a row that it is taken for), up to as many as there are
    tokens.

    What `extend` is for is asked one by one.  Of more queries each pass costs as much as the one before, and so do the
    rows that attend to decoded numbers: decoding once is taken from some number on, and for all behind it.
    """
    most = min(tokens, MOST)
    few = range(1, min(most, max(1, plan.rows(many=True) // plan.shape.group)) + 1)
    beyond = range(few.stop, most + 1)
    turn = bisect_left(beyond, True, key=lambda queries: form(plan, queries, tokens) == "dense")
    taken: list[Form] = [form(plan, queries, tokens) for queries in few]
    taken += [_in_passes(plan)] * turn
    taken += ["dense"] * (len(beyond) - turn)
    found: list[tuple[Form, int, int]] = []
    for queries, now in enumerate(taken, 1):
        first = found.pop()[1] if found and found[-1][0] == now else queries
        found.append((now, first, queries))
    return found


def told(plan: Plan, tokens: int) -> list[str]:
    """The same in words."""
    return [_sentence(plan, *item) for item in thresholds(plan, tokens)]


def _sentence(plan: Plan, form: Form, first: int, last: int) -> str:
    if form == "dense":
        beyond = f"from {first} on" if first > 1 else "any number of"
        return f"{beyond}: packed tokens are decoded once, and all query rows attend to what they are"
    rows = plan.rows(many=form == "extend")
    which = f"up to {last}" if first == 1 else f"{first} to {last}" if last > first else f"{first}"
    passes = -(-last * plan.shape.group // rows)
    read = f"up to {passes} passes" if passes > 1 else "one pass"
    return f"{which}: pages are read by {form}, {rows} query rows a program, in {read}"


def _pass(plan: Plan, *, many: bool) -> float:
    """Of one pass over a packed token of all kv heads."""
    read = loop_bytes(plan, repeated=True) * plan.shape.kv_heads / plan.tile / BANDWIDTH
    wide = plan.rows(many=many) > DECODE_ROWS
    work = sum(_work(side) * (TWICE[_work(side)] if wide else 1) for side in (plan.keys, plan.values)) / 2
    return max(read, work / TOKENS * plan.shape.kv_heads * plan.shape.head_dim / CHANNELS)


def _work(side: SidePlan) -> float:
    """Of a pass of 8 rows over 2^21 tokens; of a sum of several terms that of the most laborious alone."""
    if any(term.when is When.IN_LOOP for term in side.terms):
        return DECODED
    return GROUPED if any(term.when is When.ONCE_PER_TILE or term.groups > 1 for term in side.terms) else PLAIN


def _decode(plan: Plan) -> float:
    """Of decoding a token of all kv heads once: it is read, and float16 numbers are written."""
    numbers = plan.shape.kv_heads * plan.shape.head_dim
    total = loop_bytes(plan) * plan.shape.kv_heads / plan.tile + 2 * numbers * _item(plan)
    products = 0.0
    for side in (plan.keys, plan.values):
        if side.turned or side.residual is not None:  # float32 numbers, written and read on the way, and then rounded
            total += numbers * 4 * (1 + 2 * len(side.spaces))
        for term in side.spaces:
            total += numbers * 8 if term.mapped else 0
            products += 0 if not term.mapped or term.hadamard else 2 * numbers * term.row
    return total / ROUND_TRIP + products / EXACT_PRODUCTS


def _exact_bytes(plan: Plan) -> int:
    """Of a token of all kv heads that is not packed, or was decoded."""
    return 2 * plan.shape.kv_heads * plan.shape.head_dim * _item(plan)


def _item(plan: Plan) -> int:
    """Bytes of a decoded number."""
    return 4 if plan.exact_numbers else 2
