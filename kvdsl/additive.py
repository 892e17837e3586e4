"""Tables of sums of vectors, fitted stage by stage to what the stages before left of typical vectors.

A table without turned entries has the means of what is nearest to each (Lloyd, IEEE Trans.  Inf.  Theory 28, 1982).
With them a vector is t_a + i t_b, entries as complex numbers of pairs, and the best table for given codes solves the
normal equations of one design matrix, rows of one 1 and one i, for all pairs at once.  Means of few vectors are noise
in most of their channels: of normal numbers the nearest of n entries is worth sqrt(2 ln n) of them in its own
direction, so that D / (2 ln n) zeros are counted among the vectors of each (ridge regression).  Codes are those that
packing finds, so that what is left is what the next stage will be given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codes import Additive
from .measuring import LARGEST
from .scale import Scale

SEED = 0
ROUNDS = 10  # of a stage: what is left of one is the next one's
MOST_VECTORS = 1 << 13  # that a head's tables are fitted to; of more evenly spaced ones are taken


def sums(code: Additive, scale: Scale, x: Tensor, *, interleaved: bool) -> Tensor:
    """The tables of x (B, H, T, D): float32 (H, stages, 2**bits, D), each a number of float16."""
    rows = _over_norm(scale, x.double().nan_to_num(0.0).clamp(-LARGEST, LARGEST).cpu())
    rows = rows.transpose(0, 1).flatten(1, 2)
    rows = rows[:, :: -(-rows.shape[1] // MOST_VECTORS)].to(torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([_of_head(code, one, interleaved, generator) for one in rows])


def _over_norm(scale: Scale, x: Tensor) -> Tensor:
    """x over the root of the mean square of what shares a scale."""
    heads = scale.block.heads if isinstance(scale.block.heads, int) else x.shape[1]
    size = x.unflatten(1, (-1, heads)).square().mean((2, 4)).sqrt().repeat_interleave(heads, 1)[..., None]
    return torch.where(size > 0, x / torch.where(size > 0, size, 1.0), 0.0)


def _of_head(code: Additive, left: Tensor, interleaved: bool, generator: torch.Generator) -> Tensor:
    """The tables of one head, stage by stage, from its vectors (n, D)."""
    tables = []
    for _ in range(code.of(left.shape[-1]).count):
        chosen = torch.randint(len(left), (2**code.bits,), generator=generator)
        table = _halves(left[chosen] / (1 + code.commuting))
        for _ in range(ROUNDS):
            codes, _ = _coded(left, table, code.commuting, interleaved)
            table = _halves(_solved(left, codes, len(table), interleaved))
        tables.append(table)
        _, left = _coded(left, table, code.commuting, interleaved)
    return torch.stack(tables)


def _coded(left: Tensor, table: Tensor, commuting: bool, interleaved: bool) -> tuple[list[Tensor], Tensor]:
    """The codes that packing finds, and what they leave."""
    codes = []
    for entries in (table, quarter_turned(table, interleaved=interleaved))[: 1 + commuting]:
        nearest = (entries.square().sum(-1) / 2 - left @ entries.mT).argmin(-1)
        left = left - entries[nearest]
        codes.append(nearest)
    return codes, left


def _solved(x: Tensor, codes: list[Tensor], count: int, interleaved: bool) -> Tensor:
    """The table under which vectors x (n, D) with these codes leave the least."""
    doubt = x.shape[-1] / (2 * math.log(max(2, count)))
    sums = [_summed(x, code, count) for code in codes]
    uses = torch.stack([torch.bincount(code, minlength=count) for code in codes]).sum(0).double() + doubt
    if len(codes) == 1:
        return (sums[0] / uses[:, None]).to(torch.float32)
    together = torch.bincount(codes[0] * count + codes[1], minlength=count**2).reshape(count, count).double()
    normal = torch.complex(uses.diag(), together - together.mT)  # of a design of rows of one 1 and one i
    first, second = (_paired(one, interleaved) for one in sums)
    found = torch.view_as_real(torch.linalg.solve(normal, first - 1j * second))
    return (found.flatten(-2) if interleaved else found.mT.flatten(-2)).to(torch.float32)


def _summed(x: Tensor, code: Tensor, count: int) -> Tensor:
    """The sums of the vectors that have each code, float64 (count, D)."""
    return torch.zeros(count, x.shape[-1], dtype=torch.float64).index_add(0, code, x.double())


def _paired(x: Tensor, interleaved: bool) -> Tensor:
    """Vectors as complex numbers of their pairs."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    return torch.view_as_complex(pairs.contiguous())


def quarter_turned(x: Tensor, *, interleaved: bool) -> Tensor:
    """(x, y) -> (-y, x) for every pair of channels of x (..., D): neighbours, or channels i and i + D/2."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-second, first], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _halves(table: Tensor) -> Tensor:
    return table.clamp(-LARGEST, LARGEST).to(torch.float16).to(torch.float32)
