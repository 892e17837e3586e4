"""Rotary positions: the cosine and sine of every position, made once on the host, the same numbers everywhere.

The angle of a pair with frequency f at position t is t*f in float64; its cosine and sine are taken in float64 and
rounded to float32.  Frequencies are float32 (R/2,), one a pair: of the head's D channels the first R are rotated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1024  # positions made at a time: a number does not depend on how many there are
NEAR = 64  # positions of `near`: the most tokens of a tile


def usual(channels: int) -> Tensor:
    """Frequencies of a head that is rotated whole, of base 10000: float32 (channels / 2,)."""
    import torch

    return 1e4 ** -(torch.arange(0, channels, 2) / channels)


def waves(frequencies: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions [begin, end): float32 (end - begin, R/2), on the CPU."""
    import torch

    numbers = tuple(frequencies.detach().to("cpu", torch.float32).tolist())
    blocks = [_block(numbers, i) for i in range(begin // BLOCK, max(begin // BLOCK + 1, -(-end // BLOCK)))]
    found = torch.cat(blocks, 1)[:, begin % BLOCK :][:, : max(0, end - begin)]
    return found[0], found[1]


@lru_cache(maxsize=256)
def _block(frequencies: tuple[float, ...], index: int) -> Tensor:
    """Cosines and sines of one block of positions, float32 (2, BLOCK, R/2)."""
    import torch

    position = torch.arange(index * BLOCK, (index + 1) * BLOCK, dtype=torch.float64)
    angle = position[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()]).to(torch.float32)


def pairs(channels: int, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of every channel: its pair's number in a row of `table`, its partner, and whether it is the pair's first.

    Channels beyond `rotated` get numbers beyond the frequencies, where nothing is rotated.
    """
    import torch

    channel, half = torch.arange(channels), rotated // 2
    if interleaved:
        return channel // 2, channel ^ 1, channel % 2 == 0
    inside = channel < rotated
    pair = torch.where(inside, channel % max(1, half), channel // 2)
    partner = torch.where(inside, (channel + half) % max(1, rotated), channel)
    return pair, partner, channel < half


def turned(x: Tensor, frequencies: Tensor, at: Tensor, interleaved: bool, *, back: bool = False) -> Tensor:
    """x (B, H, T, D) with rotary positions put on, token i at position at_i, int (T,); `back`: taken off.  float64."""
    import torch

    angles = waves(frequencies, 0, int(at.max()) + 1 if len(at) else 0)
    cos, sin = (torch.nn.functional.pad(wave[at.cpu()], (0, x.shape[3] // 2 - len(frequencies))) for wave in angles)
    cos[:, len(frequencies) :] = 1
    pair, partner, first = pairs(x.shape[3], 2 * len(frequencies), interleaved)
    sign = torch.where(first == back, 1.0, -1.0)
    cos, sin = cos[:, pair].to(x.device, torch.float64), (sign * sin[:, pair]).to(x.device, torch.float64)
    return x.double() * cos + x.double()[..., partner] * sin


_TABLES: dict[tuple[bytes, int, str], Tensor] = {}


def table(frequencies: Tensor, channels: int, positions: int, device: torch.device | str) -> Tensor:
    """float32 (positions or more, channels) on a device: cosines of all channels / 2 pairs, then sines; pairs without a
    frequency have 1 and 0.  Layers share it, and it grows by doubling."""
    import torch

    key = (frequencies.numpy().tobytes(), channels, str(device))
    found = _TABLES.get(key)
    if found is None or found.shape[0] < positions:
        count = max(BLOCK, 1 << max(0, positions - 1).bit_length())
        made = torch.zeros(2, count, channels // 2)
        made[0] = 1
        made[0, :, : len(frequencies)], made[1, :, : len(frequencies)] = waves(frequencies, 0, count)
        found = _TABLES[key] = made.movedim(0, 1).reshape(count, channels).to(device)
    return found


@lru_cache(maxsize=64)
def _near(raw: bytes, channels: int, interleaved: bool, device: str) -> Tensor:
    import torch

    frequencies = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    rows = table(frequencies, channels, NEAR, "cpu")[:NEAR].unflatten(-1, (2, -1))
    pair, _, _ = pairs(channels, 2 * len(frequencies), interleaved)
    return rows[:, :, pair].flatten(1).to(device)


def near(frequencies: Tensor, channels: int, interleaved: bool, device: torch.device | str) -> Tensor:
    """float32 (NEAR, 2 * channels): the cosine of every channel at the first positions, then the sine."""
    return _near(frequencies.numpy().tobytes(), channels, interleaved, str(device))


def in_order(first: Tensor, order: Tensor) -> Tensor:
    """`near` of heads whose channels stand in orders of their own, (H, channels): (H, NEAR, 2 * channels)."""
    waves = first.unflatten(1, (2, -1))[:, :, order.long()]
    return waves.movedim(2, 0).flatten(2).contiguous()
