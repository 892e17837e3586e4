"""Numbers that a scheme takes from typical keys and values: calibrated scales, second levels, tables of levels."""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Codebook, Count, Float, Scale, Store

FINEST = 448.0  # largest e4m3: a second level puts the largest scale there
ROUNDS = 50  # of the search for a table
MOST_SAMPLES = 1 << 20
SMALL_TOPS = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def measured(store: Store, x: Tensor, side: str) -> dict[str, Tensor]:
    """What a store wants beside its pages, measured over all tokens of x (B, H, T, D): float32 by the names of
    `kvdsl.params`."""
    code, scale, found = store.code, store.measure, dict[str, Tensor]()
    if isinstance(code, Codebook) and code.levels == "calibrated":
        assert scale is not None and code.bits is not None
        found[f"{side}.code"] = table(normalised(scale, x), 2**code.bits, centred=scale.range == "absmax")
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


def normalised(scale: Scale, x: Tensor) -> Tensor:
    """The numbers of x (B, H, T, D) over their blocks' scales, float64, as a table of levels sees them."""
    batch, heads, tokens, channels = x.shape
    size = (_size(scale.block.heads, heads), _size(scale.block.tokens, tokens), _size(scale.block.channels, channels))
    if scale.block.tokens is not None and size[1] > tokens:
        size = (size[0], tokens, size[2])
    bh, bt, bc = size
    whole = x[:, :, : tokens // bt * bt].double().clamp(-65504, 65504)
    blocks = whole.reshape(batch, heads // bh, bh, -1, bt, channels // bc, bc).permute(1, 5, 0, 3, 2, 4, 6)
    # one block a token block, or one over all tokens and sequences
    rows = blocks.reshape(heads // bh * (channels // bc), -1, bh * bt * bc) if scale.when == "online" else None
    rows = blocks.reshape(heads // bh * (channels // bc), 1, -1) if rows is None else rows
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
    inside = rows - middle
    return (inside / torch.where(unit > 0, unit, 1.0)).flatten()


def _size(count: Count, whole: int) -> int:
    return count if isinstance(count, int) else whole


def table(numbers: Tensor, count: int, *, centred: bool) -> Tensor:
    """`count` levels that lie nearest to the numbers in the mean square (Lloyd's rounds from their quantiles): float32,
    rising.  `centred`: the largest size becomes 1."""
    samples = numbers.flatten().sort().values.cpu()
    samples = samples[:: max(1, len(samples) // MOST_SAMPLES)]
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * (len(samples) - 1)).round().long()
    levels = samples[places]
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), samples.cumsum(0)])
    for _ in range(ROUNDS):
        borders = (levels[1:] + levels[:-1]) / 2
        ends = torch.cat([torch.tensor([0]), torch.searchsorted(samples, borders), torch.tensor([len(samples)])])
        sizes = ends[1:] - ends[:-1]
        means = (sums[ends[1:]] - sums[ends[:-1]]) / sizes.clamp(min=1)
        levels = torch.where(sizes > 0, means, levels)
    if centred:
        levels = levels / levels.abs().max().clamp(min=2.0**-24)
    return _rising(levels.to(torch.float32))


def _rising(levels: Tensor) -> Tensor:
    """Equal levels moved apart by the least that float16 operands tell apart."""
    least = 2.0**-10 * max(float(levels.abs().max()), 2.0**-10)
    apart = [float(levels[0])]
    for level in levels[1:].tolist():
        apart.append(max(level, apart[-1] + least) if level <= apart[-1] else level)
    return torch.tensor(apart, dtype=torch.float32)
