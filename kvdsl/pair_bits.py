"""How many bits which share of a head's rotary pairs should have, by the energy of keys and queries in them; or of its
numbers in a basis of eigenvectors, by their variance.

One more bit makes a quarter of a pair's error in scores, so the next one goes where E*4^-b is largest: what that rule
gives has the least sum of all with as many bits (Block-GTQ, arXiv 2606.24033).  It is what a dynamic program would find
for errors that fall so (KVTC, arXiv 2511.01815), 0 bits included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ShapeError
from .transforms import Pairs

LEAST_ENERGY = 2.0**-100  # of a part without any: its logarithm is a number


def energies(k: Tensor, q: Tensor, pairs: Pairs = "halves") -> Tensor:
    """(mean |k_j|^2 + mean |q_j|^2)/2 of every rotary pair j: float64 (H, D/2), of keys k (B, H, T, D) and of queries
    q (B, Hq, Q, D), each of a group of query heads taken on its own.

    Raises ShapeError for queries whose heads are no multiple of those of the keys, or of another length.
    """
    heads, channels = k.shape[1], k.shape[3]
    if q.dim() != 4 or q.shape[1] % heads or q.shape[3] != channels:
        right = f"(batch, a multiple of {heads}, queries, {channels})"
        raise ShapeError(f"q: shape {tuple(q.shape)}; beside keys {tuple(k.shape)} give {right}")
    whole = sum(x.double().unflatten(1, (heads, -1)).square().mean((0, 2, 3)).cpu() for x in (k, q))
    size = whole.unflatten(1, (2, -1)).sum(1) if pairs == "halves" else whole.unflatten(1, (-1, 2)).sum(2)
    return size / 2


def allotted(energy: Tensor, bits: float, least: int = 1, most: int = 8) -> Tensor:
    """Bits of every pair of each head, `bits` in the mean, rounded down to whole bits a head: int64 of the shape of
    energies (..., D/2).  Of equal ones the first has the next bit.

    Raises ValueError for a mean below `least`, or above `most`.
    """
    if not least <= bits <= most:
        raise ValueError(f"bits: {bits} in the mean of {least} to {most} a pair; give a mean between them")
    found = torch.full(energy.shape, least, dtype=torch.int64)
    size = energy.detach().cpu().double()
    for _ in range(int(bits * energy.shape[-1]) - least * energy.shape[-1]):
        gain = (size * 4.0 ** -found.double()).masked_fill(found >= most, -1.0)
        at = gain.argmax(-1, keepdim=True)
        found.scatter_add_(-1, at, torch.ones_like(at))
    return found


def quotas(
    k: Tensor, q: Tensor, bits: float, *, parts: int = 4, pairs: Pairs = "halves", least: int = 1, most: int = 8
) -> dict[int, float]:
    """Which share of a head's pairs should have how many bits, alike for all heads of keys k (B, H, T, D) that meet
    queries q (B, Hq, Q, D), fewest bits first: what `Bands(channels=...)` behind `Permute("energy")` takes.

    Each head's pairs in the order of their energy are cut into so many equal `parts`, of which each has as many bits as
    by the rule for the geometric mean of its energies over the heads.  `bits` is the mean, rounded down to whole bits
    of all parts together.  Raises ValueError for pairs that are no whole number of parts.
    """
    return _shares(energies(k, q, pairs), bits, parts, least, most)


def head_quotas(
    k: Tensor, q: Tensor, bits: float, *, parts: int = 4, pairs: Pairs = "halves", least: int = 1, most: int = 8
) -> tuple[dict[int, float], ...]:
    """`quotas` of every kv head alone, as Block-GTQ has them: of schemes in a table of `heads`."""
    return tuple(_shares(one[None], bits, parts, least, most) for one in energies(k, q, pairs))


def basis_quotas(
    x: Tensor, bits: float, *, parts: int = 8, least: int = 0, most: int = 8, mean: bool = True
) -> dict[int, float]:
    """Which share of a head's numbers should have how many bits in the basis of its own eigenvectors, alike for all
    heads of x (B, H, T, D), the numbers of largest variance first: what `Bands(channels=...)` behind
    `Eigenbasis("own")` takes, and whose part of 0 bits its `rank` leaves out.

    Numbers are cut into so many equal `parts`, of which each has as many bits as by the rule for the geometric mean of
    its variances over the heads.  `mean`: the mean comes off first, as `ChannelShift` takes it.  Raises ValueError for
    channels that are no whole number of parts.
    """
    rows = x.detach().cpu().double().transpose(0, 1).flatten(1, 2)
    rows = rows - rows.mean(1, keepdim=True) if mean else rows
    variances = torch.linalg.eigvalsh(rows.mT @ rows / rows.shape[1])
    found = _shares(variances, bits, parts, least, most, "channels")
    return {count: found[count] for count in sorted(found, reverse=True)}


def _shares(energy: Tensor, bits: float, parts: int, least: int, most: int, what: str = "pairs") -> dict[int, float]:
    """Which share of the pairs of heads, whose energies (H, D/2) these are, should have how many bits."""
    rising = energy.sort(-1).values
    if rising.shape[-1] % parts:
        raise ValueError(f"parts: {rising.shape[-1]} {what} are no whole number of {parts} parts; give a divisor")
    spectrum = rising.unflatten(-1, (parts, -1)).mean(-1).clamp(min=LEAST_ENERGY).log().mean(0).exp()
    each = allotted(spectrum, bits, least, most).tolist()
    return {count: each.count(count) / parts for count in sorted(set(each))}
