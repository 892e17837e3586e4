"""Which pages a program of attention reads, in Triton: they are dealt out in turn.

Program `split` of `splits` reads the pages low + split, low + split + splits and so on, all tiles of one behind each
other.  Where every page is clean from the first on, which is everywhere but under a window and behind padding, the
number of a program's first page is asked for at once, beside the sequence's length and not after it: of a short context
such waits are most of the time.
"""

from __future__ import annotations

from .plan import Plan
from .text import fill

Holes = dict[str, list[str]]

EARLY = """
# the number of the first page, should pages be clean from the first on: does not wait for the length
early_page = tl.load(table + split, mask=split < table_width, other=0)
"""
FIRST = """
begin = low + split
next_page = tl.load(table + begin, mask=(low > 0) & (begin < high), other=early_page)
"""
PLACED_FIRST = """
begin = split
next_page = early_page
"""
WHOLE = """
for tile in tl.range(begin, high, splits, num_stages=STAGES):
    page = next_page.to(tl.int64)
    next_page = tl.load(table + tl.minimum(tile + splits, high))
"""
TILES = """
count = tl.maximum(high - begin + splits - 1, 0) // splits
for step in tl.range(0, count * $sub, num_stages=STAGES):
    tile = (begin + step // $sub * splits) * $sub + step % $sub
    page = next_page.to(tl.int64)
    next_page = tl.load(table + begin + (step + 1) // $sub * splits, mask=step + 1 < count * $sub, other=0)
"""


def deal(plan: Plan) -> Holes:
    """What attention's main loop goes over: `early` before the bounds are known, `first` once they are, `loop` its
    head and the page's number."""
    sub = plan.layout.page_tokens // plan.tile
    loop = fill(TILES, sub=sub) if sub > 1 else fill(WHOLE)
    return {
        "early": fill(EARLY).splitlines(),
        "first": fill(PLACED_FIRST if plan.shape.placed else FIRST).splitlines(),
        "loop": loop.splitlines(),
    }
