"""Numbers that a scheme takes from typical keys and values: calibrated scales, second levels, tables of levels.

A table has the least weighted squared error over its numbers.  Of up to CELLS different ones it is the best there is;
of more, the best whose borders lie between CELLS cells of equally many, moved from there to where every level is the
mean of its numbers (Lloyd's rounds).  More than MOST_SAMPLES count as the means of so many groups of neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .additive import sums
from .clusters import vectors
from .scheme import Additive, Codebook, Count, Float, PreRope, Scale, Store, Vectors

FINEST = 448.0  # largest e4m3: a second level puts the largest scale there
ROUNDS = 50  # of the search for a table
CELLS = 512
MOST_SAMPLES = 1 << 20
LEAST_MASS = 2.0**-900
SMALL_TOPS = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def measured(
    store: Store,
    x: Tensor,
    side: str,
    gradient: Tensor | None = None,
    single: Tensor | None = None,
    rope: PreRope | None = None,
) -> dict[str, Tensor]:
    """What a store wants beside its pages, measured over all tokens of x (B, H, T, D): float32 by the names of
    `kvdsl.params`.  `gradient`: the loss's by x, of the same shape, where the table is weighted.  `single`: which
    numbers stand in for others, that are read whatever their code is: a table is not fitted to them.  `rope`: what took
    positions off, which says what a pair is."""
    code, scale, found = store.code, store.measure, dict[str, Tensor]()
    if isinstance(code, Codebook) and code.levels == "calibrated":
        assert scale is not None and code.bits is not None
        numbers, units = normalised(scale, x)
        # An error e of a number over its scale s costs the loss (g s e)^2 / 2.
        weights = None if gradient is None else (in_blocks(scale, gradient.double()) * units).square().flatten()
        if single is not None:
            coded = ~in_blocks(scale, single).flatten()
            numbers, weights = numbers[coded], None if weights is None else weights[coded]
        levels = table(numbers, 2**code.bits, weights, centred=scale.range == "absmax")
        found[f"{side}.code"] = levels if code.match is None else matched(levels, numbers)
    if isinstance(code, Vectors):
        found[f"{side}.code"] = vectors(code, x, gradient)
    if isinstance(code, Additive):
        assert scale is not None
        found[f"{side}.code"] = sums(code, scale, x, interleaved=rope is not None and rope.interleaved)
    if scale is not None and scale.when == "calibrated":
        found[f"{side}.scale"] = _scale(store, x, side, found)
    if scale is not None and scale.scale is not None:
        found[f"{side}.scale.scale"] = second_level(store, x)
    return found


def _scale(store: Store, x: Tensor, side: str, params: dict[str, Tensor]) -> Tensor:
    """By the definition, measured over the data as one block of tokens."""
    from .reference.quantize import quantize

    tokens = x.transpose(0, 1).reshape(1, x.shape[1], -1, x.shape[3])
    online = quantize(store.with_(residual=None, **{"scale.when": "online"}), tokens, params, side)
    assert online.scale is not None
    parts = [part[0, :, 0].to(torch.float32) for part in (online.scale, online.offset) if part is not None]
    return torch.stack(parts) if len(parts) > 1 else parts[0]


def second_level(store: Store, x: Tensor) -> Tensor:
    """The largest scale that a block of x (B, H, T, D) can have, over the largest number that holds it: float32
    (H or 1, 1); 1 where all numbers are 0."""
    scale = store.measure
    assert scale is not None and scale.scale is not None
    top = _top(store) if scale.range in ("absmax", "signed_absmax") else 1.0
    axes = (0, 2, 3) if scale.scale.block.heads == 1 else (0, 1, 2, 3)
    largest = x.to(torch.float32).abs().amax(axes).reshape(-1, 1)
    found = (largest.double() / (top * FINEST)).to(torch.float32)
    return torch.where(found > 0, found, 1.0).cpu()


def _top(store: Store) -> float:
    """The largest size of a level."""
    code, scale = store.code, store.measure
    assert scale is not None
    if isinstance(code, Float):
        return SMALL_TOPS[code.format]
    if isinstance(code, Codebook):
        from .levels import table as levels

        channels = scale.block.channels if isinstance(scale.block.channels, int) else 128
        return 1.0 if code.levels == "calibrated" else max(map(abs, levels(code, channels)))
    from .reference.quantize import level_count

    return level_count(store) / 2


def normalised(scale: Scale, x: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of x (B, H, T, D) over their blocks' scales, flat, as a table of levels sees them, and these scales,
    of the blocks' own shape (see `in_blocks`); float64."""
    rows = in_blocks(scale, x.double().clamp(-65504, 65504))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    middle = torch.zeros_like(low)
    if scale.range == "norm":
        unit = rows.square().mean(-1, keepdim=True).sqrt()
    elif scale.range == "absmean":
        unit = rows.abs().mean(-1, keepdim=True)
    elif scale.range == "absmax":
        unit = torch.maximum(-low, high)
    else:
        if scale.range == "minmax_zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        unit, middle = (high - low) / 2, (high + low) / 2
    unit = torch.where(unit > 0, unit, 1.0)
    return ((rows - middle) / unit).flatten(), unit


def in_blocks(scale: Scale, x: Tensor) -> Tensor:
    """x (B, H, T, D) by the blocks that share a scale, (blocks, numbers of each): one a token block, or one over all
    tokens and sequences.  Tokens that fill no block are left out."""
    batch, heads, tokens, channels = x.shape
    size = (_size(scale.block.heads, heads), _size(scale.block.tokens, tokens), _size(scale.block.channels, channels))
    if scale.block.tokens is not None and size[1] > tokens:
        size = (size[0], tokens, size[2])
    bh, bt, bc = size
    whole = x[:, :, : tokens // bt * bt]
    blocks = whole.reshape(batch, heads // bh, bh, -1, bt, channels // bc, bc).permute(1, 5, 0, 3, 2, 4, 6)
    if scale.when == "online":
        return blocks.reshape(-1, bh * bt * bc)
    return blocks.reshape(heads // bh * (channels // bc), -1)


def _size(count: Count, whole: int) -> int:
    return count if isinstance(count, int) else whole


def table(numbers: Tensor, count: int, weights: Tensor | None = None, *, centred: bool) -> Tensor:
    """`count` levels with the least sum of weights * squared distances of the numbers to the nearest: float32, rising.

    weights   of the numbers, none of them negative nor all 0; None: all alike
    centred   whether the largest size is made 1
    """
    samples, order = numbers.flatten().double().cpu().sort(stable=True)
    mass = torch.ones_like(samples) if weights is None else weights.flatten().double().cpu()[order]
    samples, mass = samples[mass > 0], mass[mass > 0]
    samples, mass = _merged(samples, mass / mass.sum(), MOST_SAMPLES)
    levels = _best(*_merged(samples, mass, CELLS), count)
    masses, moments = _sums(mass), _sums(mass * samples)
    for _ in range(ROUNDS):
        borders = torch.searchsorted(samples, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.tensor([0]), borders, torch.tensor([len(samples)])])
        sizes = masses[ends[1:]] - masses[ends[:-1]]
        means = (moments[ends[1:]] - moments[ends[:-1]]) / sizes
        # Of masses far apart the sums lose the small ones: a mean lies between the ends of its cell in any case.
        last = len(samples) - 1
        means = torch.minimum(
            torch.maximum(means, samples[ends[:-1].clamp(max=last)]), samples[(ends[1:] - 1).clamp(min=0)]
        )
        moved = torch.where(sizes > 0, means, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    if centred:
        levels = levels / levels.abs().max().clamp(min=2.0**-24)
    return _rising(levels.sort().values.to(torch.float32))


def matched(levels: Tensor, numbers: Tensor) -> Tensor:
    """The levels that numbers are compared with, and those that codes are decoded at, float32 (2, levels): moved and
    stretched so that mean and standard deviation stay those of the numbers; moved alone if they all get one code."""
    numbers, exact = numbers.flatten().double().cpu(), levels.double()
    nearest = exact[torch.bucketize(numbers, (exact[1:] + exact[:-1]) / 2)]
    several = bool((nearest != nearest[0]).any())
    stretch = numbers.std(correction=0) / nearest.std(correction=0) if several else 1.0
    stretched = (exact - nearest.mean()) * stretch + numbers.mean()
    return torch.stack([levels, _rising(stretched.to(torch.float32))])


def _sums(x: Tensor) -> Tensor:
    """Of the first 0, 1, ... of x."""
    return torch.cat([torch.zeros(1, dtype=x.dtype), x.cumsum(0)])


def _merged(samples: Tensor, mass: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` groups of equally many neighbours: their means and masses."""
    if len(samples) <= most:
        return samples, mass
    group = torch.arange(len(samples)) * most // len(samples)
    masses, moments = (torch.zeros(most, dtype=x.dtype).index_add(0, group, x) for x in (mass, mass * samples))
    return moments / masses, masses


def _best(cells: Tensor, mass: Tensor, count: int) -> Tensor:
    """The means of `count` runs of the rising cells, one after the other, with the least squared error of all: of j
    cells in k runs, the least over where the last one begins."""
    sums = [_sums(mass * cells**power) for power in (0, 1, 2)]
    masses, moments, squares = (x[None, :] - x[:, None] for x in sums)
    # of one run, from a cell to before another
    error = (squares - moments.square() / masses.clamp(min=LEAST_MASS)).clamp(min=0)
    error = torch.where(torch.ones_like(error, dtype=torch.bool).triu(1), error, torch.inf).fill_diagonal_(0)
    least, begins = error[0], list[Tensor]()
    for _ in range(count - 1):
        least, begin = (least[:, None] + error).min(0)
        begins.append(begin)
    end, levels = len(cells), list[Tensor]()
    for begin in (*reversed(begins), torch.zeros(end + 1, dtype=torch.int64)):
        start = int(begin[end])
        # A run without a cell: there are fewer cells than levels.
        run = slice(start, end) if start < end else slice(start, start + 1) if start < len(cells) else slice(-1, None)
        levels.append((cells[run] * mass[run]).sum() / mass[run].sum())
        end = start
    return torch.stack(levels[::-1])


def _rising(levels: Tensor) -> Tensor:
    """Equal levels moved apart by the least that float16 operands tell apart."""
    least = 2.0**-10 * max(float(levels.abs().max()), 2.0**-10)
    apart = [float(levels[0])]
    for level in levels[1:].tolist():
        apart.append(max(level, apart[-1] + least) if level <= apart[-1] else level)
    return torch.tensor(apart, dtype=torch.float32)
