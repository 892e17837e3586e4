"""What is legal of vectors of low rank: blocks that a kernel reads at once, and nothing that low rank is blind to."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import Fault
from .kinds import LEAST_FACTORED
from .scheme import LowRank
from .sites import Site, rule


@rule("~.code", "~.scale", "~.transform", "~.outliers")
def _low_rank_is_of_the_vectors_themselves(site: Site) -> Iterator[Fault]:
    store = site.store
    if not isinstance(store.code, LowRank):
        return
    if store.scale is not None:
        yield site.fault("scale", "numbers of low rank are stored in fp16 and take no scale", "leave scale out")
    if store.transform:
        fact = "of rotated vectors the best ones of low rank are the same, rotated"
        yield site.fault("transform", fact, "leave transform out")
    if site.apart or store.split is not None:
        fact = "low rank is of a whole vector, and outlier channels part it"
        yield site.fault("code", fact, "use Uniform(bits=2) under a scale, and residual=LowRank(4) of the outer store")
    if site.band is not None:
        fact = "low rank is of a whole vector, and this is a stretch of one"
        yield site.fault("code", fact, "use Uniform(bits=2) under a scale, or Float('fp16')")


@rule("~.code")
def _a_sub_tile_is_of_one_block(site: Site) -> Iterator[Fault]:
    code = site.store.code
    if isinstance(code, LowRank) and code.tokens % LEAST_FACTORED:
        fact = f"{code.tokens} tokens are no whole number of the {LEAST_FACTORED} that are read at once"
        yield site.fault("code.tokens", fact, f"use {max(1, round(code.tokens / LEAST_FACTORED)) * LEAST_FACTORED}")
