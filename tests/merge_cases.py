"""Outputs of merges, whatever a program of them has: some channels of a row, or of as many rows as a product has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl.codegen import build, launches
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import ALL
from kvdsl.shape import Shape

MAPPED = ("turboquant4", "gear2", "omniquant4", "kvtc2")
"""Exact tokens apart, numbers of several terms, shifts, numbers that do not fill a tile."""
SCHEMES = (*MAPPED, "token4", "quarot4")
SHAPE = Shape(64, 2, 8)
TILES = {"mapped_tile": ((1, 64), (16, 32), (16, 64)), "merge_lanes": (64, 32)}
"""What of `launches` decides -> what it may say."""
BATCH, QUERIES, TOKENS = 3, 3, 200  # 36 rows a kv head: the last program's are not all there


def outputs(name: str, device: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a few queries of a ragged batch."""
    scheme = ALL[name].with_(layers=())
    generator = torch.Generator().manual_seed(3)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(BATCH, heads, tokens, SHAPE.head_dim, generator=generator).half().to(device)

    keys, values = normal(2, TOKENS), normal(2, TOKENS)
    params = {key: number.to(device) for key, number in kvdsl.calibrate(scheme, keys.cpu(), values.cpu()).items()}
    cache = QuantizedCache(build(scheme, SHAPE, "triton"), BATCH, params=params, device=device)
    cache.append(keys, values, counts=[TOKENS, 70, 5])
    return cache.append_and_attend(normal(8, QUERIES), normal(2, QUERIES), normal(2, QUERIES))


def alike(name: str, patch: pytest.MonkeyPatch, device: str) -> None:
    """Whatever the tile, outputs and log-sum-exps are those of another one, to the rounding of an output."""
    what, found = "mapped_tile" if name in MAPPED else "merge_lanes", []
    for tile in TILES[what]:
        patch.setattr(launches, what, lambda *counts, tile=tile: tile)
        found.append(outputs(name, device))
    (out, lse), *others = found
    assert bool(out.isfinite().all()) and float(out.std()) > 0.01
    for other, its_lse in others:
        torch.testing.assert_close(other, out, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(its_lse, lse, rtol=1e-6, atol=1e-6)
