"""Which pages of a sequence a program of attention reads, in Triton, and the first of them asked for early.

What a program needs first comes from memory in two steps, lengths and the page's number beside the query, then the
page.  The second begins before the query is prepared, or before it is there, where another kernel maps it.
"""

from __future__ import annotations

from .layout import Layout
from .plan import Plan
from .text import fill, padded

LINE = 128  # bytes that a cache reads at once
MOST_LINES = 256  # of a page that are asked for early

# Every so many-th page: what the programs of a sequence read at one time stands side by side.  Microseconds on an H200
# of shares in one piece, and so: `token2` 16 x 8 x 16384 58.6, 55.2, 8 x 8 x 131072 174, 170, `kivi2` 1 x 8 x 32768
# 24.0, 21.5, `channel4` 8 x 8 x 131072 284, 286.
EVERY = """
next_page = tl.load(table + tl.minimum(low + split, high), mask=low > 0, other=guess)
"""
EVERY_LOOP = "for tile in tl.range(low + split, high, splits, num_stages=STAGES):"

# Of pages of several tiles as many tiles in a row: `int8_token_head`, whose pages are large, 8 x 8 x 131072 507, and
# 512 the other way.
SHARES = """
share = ((high - low) * $sub + splits - 1) // splits
begin = tl.minimum(low * $sub + split * share, high * $sub)
stop = tl.minimum(begin + share, high * $sub)
next_page = tl.load(table + begin // $sub, mask=begin // $sub != split // $sub, other=guess)
"""
SHARES_LOOP = "for tile in tl.range(begin, stop, num_stages=STAGES):"

FETCH = """
line = tl.minimum(tl.arange(0, $padded), $last)
fetch($pool + tl.where($some, next_page, 0).to(tl.int64) * $page + h * $head + line * $each)
"""

# The page that a program has for itself.  The assembler would prepare the query first but for a branch, which it moves
# nothing across.  Microseconds on an H200 without, and so: 1 x 8 x 1024 `kvtq` 10.7, 10.0, `token3` 10.6, 10.3;
# programs of one warp do not gain by it, 1 x 8 x 4096 `kvtq` 14.2, 15.0.
EARLY = "EARLY"
ONLY = """
if EARLY:  # a page each
    $fetch
    if queries == 0:  # never: else what is below would be computed before the page is asked for
        return
"""


class Shares:
    """Prints what shares the pages of a sequence among programs; `pool`: a pointer to where pages are."""

    def __init__(self, plan: Plan, pool: str) -> None:
        self.layout: Layout = plan.layout
        self.pool, self.sub = pool, plan.page_tiles

    def loop(self) -> dict[str, str]:
        """The main loop's head, and which page follows a tile."""
        if self.sub == 1:
            return {"loop": EVERY_LOOP, "next": "tl.minimum(tile + splits, high)"}
        return {"loop": SHARES_LOOP, "next": f"(tile + 1) // {self.sub}"}

    def first(self, bounds: list[str]) -> list[str]:
        """Lines that say which pages, between `bounds`, are a program's own, and which is first."""
        return [*bounds, *fill(SHARES if self.sub > 1 else EVERY, sub=self.sub).splitlines()]

    def fetch(self) -> list[str]:
        """Lines that ask for the first page."""
        layout = self.layout
        size = next(number for number in (32, 16, 8) if str(number) in self.pool) // 8
        lines = min(MOST_LINES, -(-layout.head_bytes // LINE))
        some = "begin < stop" if self.sub > 1 else "low + split < high"
        return fill(
            FETCH, some=some, pool=self.pool, padded=padded(lines), last=lines - 1, page=layout.page_bytes // size,
            head=layout.head_bytes // size, each=LINE // size,
        ).splitlines()  # fmt: skip

    def only(self) -> list[str]:
        """Lines that ask for the page of programs that have one each."""
        return [*fill(ONLY, fetch=self.fetch()).splitlines(), ""]
