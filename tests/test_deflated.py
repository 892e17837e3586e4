"""Pages as DEFLATE streams: the same bytes come back, fewer wait, and what is damaged is named with nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_cases import compiled, filled, pair, same, view

from kvdsl.deflated import LENGTHS, deflated, inflated
from kvdsl.errors import CacheError
from kvdsl.paged_cache import PagedCache
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.snapshot import snapshot


def test_a_saved_cache_of_streams_is_smaller_and_comes_back(tmp_path: Path) -> None:
    cache = filled(compiled("whole"), *pair(1, 120))
    plain, small = tmp_path / "plain", tmp_path / "small"
    cache.save(plain)
    cache.save(small, deflate=9)
    assert small.stat().st_size < plain.stat().st_size
    assert same(view(QuantizedCache.load(small, compiled("whole"), capacity=512)), view(cache))
    with pytest.raises(CacheError, match="deflate: 10 is no level; give 1, the fastest, to 9, or None"):
        cache.save(small, deflate=10)


def test_damaged_streams_are_named() -> None:
    """Cut, changed, of another size, or with bytes behind them; none makes more than a page."""
    document, tensors = deflated(*snapshot(filled(compiled("whole"), *pair(1, 120))), 6)
    sizes = tensors[LENGTHS].tolist()
    torn = tensors["pages"].clone()
    torn[sizes[0] + sizes[1] // 2] ^= 255
    with pytest.raises(CacheError, match="the stream of page 1 is damaged"):
        inflated(document, tensors | {"pages": torn})
    with pytest.raises(CacheError, match="streams of .* bytes are told, and there are"):
        inflated(document, tensors | {"pages": torn[:-1]})
    moved = tensors[LENGTHS] + torch.tensor([1, -1, *[0] * (len(sizes) - 2)], dtype=torch.int32)
    with pytest.raises(CacheError, match="the stream of page 0 is damaged: it is not one of"):
        inflated(document, tensors | {LENGTHS: moved})
    with pytest.raises(CacheError, match="the stream of page 0 is damaged: it is not one of 16 bytes"):
        inflated(document | {"page_bytes": 16}, tensors)


def test_a_sequence_waits_in_fewer_bytes_and_a_damaged_one_stays_out(tmp_path: Path) -> None:
    """Swapped out in either form it comes back bit for bit; a stream that is damaged leaves all as it was."""
    cache = PagedCache(compiled("whole"), pages=16, device="cpu")
    cache.add("a")
    cache.append(["a"], *pair(1, 120))
    before = cache.pool.bytes[list(cache.pages("a"))].clone()
    cache.swap_out("a")
    held = cache.stats()["swapped"]
    cache.swap_in("a")
    cache.swap_out("a", deflate=6)
    assert cache.stats()["swapped"] < held
    away = cache._sequences.lines["a"].away
    assert isinstance(away, tuple)
    away[1]["pages"][5] ^= 255
    with pytest.raises(CacheError, match="the stream of page 0 is damaged"):
        cache.swap_in("a")
    assert cache.swapped == ("a",) and cache.stats()["pages_used"] == 0
    away[1]["pages"][5] ^= 255
    cache.swap_in("a")
    assert torch.equal(cache.pool.bytes[list(cache.pages("a"))], before)
    cache.swap_out("a", tmp_path / "a", deflate=1)
    cache.swap_in("a")
    assert torch.equal(cache.pool.bytes[list(cache.pages("a"))], before)
