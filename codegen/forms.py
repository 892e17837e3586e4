"""Which form of attention is the cheapest for so many queries: a model of what each costs, in microseconds on an H200.

    decode   a program has few query rows (8, or 16 of wide groups) and reads every page
    extend   a program has 16 rows where registers allow; more rows are passes, each of which reads every page again
    dense    packed tokens are decoded once into memory, and programs of many rows attend to what they are

A pass over packed codes is bound by instructions, not by bytes, from about 16 rows on, so decoding once wins where
there are rows enough to pay for a round trip of float16 numbers through memory.  Constants are of 2^21 tokens of a kv
head with head_dim 128 (8 x 8 x 32768):

    measured  a pass of 16 rows: 71 us of 4-bit codes (four passes 285, sixteen 1115), 112 us of 2-bit ones (419 and
              1800), two thirds of that of 8 rows (56 and 71); reading at 4.4 TB/s
    assumed   attention to float16 at 450 Tflop/s, three quarters of what the framework reaches (453 us for 256 rows);
              10 us to launch, 20 where tokens are decoded first; maps that decoded numbers go through at the bytes,
              or the float64 products, that they take

Only the order of sizes matters: where dense and extend cost the same, either is right.  One sequence is looked at, so
that what it gets does not depend on who else is in the batch.
"""

from __future__ import annotations

from kvdsl.kernels import Form

from .launches import loop_bytes
from .plan import EXTEND_ROWS, Plan, SidePlan

TOKENS = 1 << 21  # tokens of a kv head that the constants are of
CHANNELS = 128
BANDWIDTH = 4.4e6  # bytes a microsecond
FEW_BITS, MANY_BITS = 112.0, 71.0  # a pass of 16 rows of codes below 4 bits, of others
FEW_ROWS = 2 / 3  # of that, a pass of 8 rows
PRODUCTS = 450e6  # floating-point operations a microsecond, of float16
EXACT_PRODUCTS = 30e6  # of float32 and of float64
LAUNCH = 10.0
MOST = 4096  # queries that thresholds are looked for up to


def form(plan: Plan, queries: int, packed: int, exact: int = 0, window: int | None = None) -> Form:
    """The cheapest for one sequence with so many packed tokens and so many exact ones; one query is always decoded."""
    few = queries == 1 or queries * plan.shape.group <= plan.rows(many=False)
    if few or dense_cost(plan, queries, packed, exact) >= pages_cost(plan, queries, packed, exact, window):
        return "decode" if few else "extend"
    return "dense"


def pages_cost(plan: Plan, queries: int, packed: int, exact: int = 0, window: int | None = None) -> float:
    """Of the kernels that read pages, in passes."""
    rows = queries * plan.shape.group
    if window is not None:
        packed = min(packed, window + queries)
    many = rows > plan.rows(many=False)
    each = plan.rows(many=many)
    return LAUNCH + -(-rows // each) * (packed * _pass(plan, each) + exact * _read(_exact_bytes(plan)))


def dense_cost(plan: Plan, queries: int, packed: int, exact: int = 0) -> float:
    """Of decoding all that is packed, and of attention to that and to the exact tokens."""
    operations, each = 4 * plan.shape.head_dim * plan.shape.kv_heads, plan.rows(many=True)
    rows = (
        -(-queries * plan.shape.group // each) * each
    )  # whole passes, so that more queries never turn the choice back
    rate = EXACT_PRODUCTS if _item(plan) == 4 else PRODUCTS
    attend = max(_read(_exact_bytes(plan)), rows * operations / rate)
    return 2 * LAUNCH + packed * _decode(plan) + (packed + exact) * attend


def thresholds(plan: Plan, tokens: int) -> dict[Form, tuple[int, int]]:
    """Form -> the first and the last number of queries that it is taken for, up to as many as there are tokens."""
    found: dict[Form, tuple[int, int]] = {}
    for queries in range(1, min(tokens, MOST) + 1):
        now = form(plan, queries, tokens)
        found[now] = (found[now][0] if now in found else queries, queries)
    return found


def told(plan: Plan, tokens: int) -> list[str]:
    """The same in words."""
    return [_sentence(plan, *item) for item in thresholds(plan, tokens).items()]


def _sentence(plan: Plan, form: Form, span: tuple[int, int]) -> str:
    first, last = span
    if form == "dense":
        beyond = f"from {first} on" if first > 1 else "any number of"
        return f"{beyond}: packed tokens are decoded once, and all query rows attend to what they are"
    rows = plan.rows(many=form == "extend")
    which = f"up to {last}" if first == 1 else f"{first} to {last}" if last > first else f"{first}"
    passes = -(-last * plan.shape.group // rows)
    read = f"up to {passes} passes" if passes > 1 else "one pass"
    return f"{which}: pages are read by {form}, {rows} query rows a program, in {read}"


def _pass(plan: Plan, rows: int) -> float:
    """Of one pass over a packed token of all kv heads."""
    read = _read(loop_bytes(plan, repeated=True) * plan.shape.kv_heads / plan.tile)
    work = (_work(plan.keys) + _work(plan.values)) / 2 * plan.shape.kv_heads * plan.shape.head_dim / CHANNELS
    return max(read, work / TOKENS * (1.0 if rows == EXTEND_ROWS else FEW_ROWS))


def _work(side: SidePlan) -> float:
    """Of a pass of 16 rows over 2^21 tokens; of a sum of several terms that of the codes of the fewest bits alone."""
    few = any(0 < term.alphabet.bits < 4 for term in side.terms if not term.floats)
    return FEW_BITS if few else MANY_BITS


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
    return _read(total) + products / EXACT_PRODUCTS


def _read(total: float) -> float:
    return total / BANDWIDTH


def _exact_bytes(plan: Plan) -> int:
    """Of a token of all kv heads that is not packed, or was decoded."""
    return 2 * plan.shape.kv_heads * plan.shape.head_dim * _item(plan)


def _item(plan: Plan) -> int:
    """Bytes of a decoded number."""
    return 4 if plan.exact_numbers else 2
