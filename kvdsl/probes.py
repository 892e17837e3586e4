"""Which queries are asked for the attention they give: the newest ones, and some drawn by a seed."""

from __future__ import annotations

import torch

from .tiers import Probes


def amount(wanted: int | float, whole: int) -> int:
    """A count, or the share of `whole` that is meant, rounded down."""
    return min(wanted, whole) if isinstance(wanted, int) else int(wanted * whole)


def probe_rows(probes: Probes | None, queries: int, length: int) -> list[int]:
    """The places of the probes among `queries` queries, the last of which belongs to token `length` - 1: ascending.

    The newest share is what is left of `queries` behind the rest, rounded down, as in ZipCache's code.  Where both
    amounts come to nothing the newest query is asked.  What is drawn depends on the seed and the two counts alone.
    """
    if probes is None:
        return list(range(queries))
    recent = probes.recent
    newest = min(recent, queries) if isinstance(recent, int) else queries - int((1 - recent) * queries)
    others = queries - newest
    count = min(others, amount(probes.random, queries))
    # The generator knows the low 32 bits of a seed: a prime each keeps what goes in apart.
    mixed = probes.seed * 2654435761 + length * 1000003 + queries
    generator = torch.Generator(device="cpu").manual_seed(mixed % (1 << 32))
    drawn = torch.randperm(others, generator=generator)[:count].sort().values.tolist()
    return [*drawn, *range(others, queries)] or list(range(queries))[-1:]
