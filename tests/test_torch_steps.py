"""Steps of decoding on the torch backend: what is done once for sequences that are alike is what is done for any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl.codegen import build
from kvdsl.codegen.layout import SideLayout
from kvdsl.codegen.run_torch import Span, TorchModule
from kvdsl.codegen.run_torch_pages import TorchPages
from kvdsl.kernels import AttentionState, KernelSet
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.shape import Shape

SHAPE = Shape(64, 2, 4, "fp32")
SCHEMES = ("kivi4", "kivi2_sinks", "int8_token_head", "quarot4", "q4_1", "fp16")


def numbers(tokens: int, heads: int = SHAPE.kv_heads) -> Tensor:
    return torch.randn(2, heads, tokens, SHAPE.head_dim, generator=torch.Generator().manual_seed(tokens + heads))


def steps(kernels: KernelSet, window: int | None = None) -> Iterator[tuple[QuantizedCache, Tensor, Tensor]]:
    """A cache after a prompt, and every few of the steps that follow, with what its attention gave."""
    cache = QuantizedCache(kernels, 2, window=window)
    cache.append(numbers(150), numbers(150, 2))
    for step, (keys, values) in enumerate(zip(numbers(70).split(1, 2), numbers(71).split(1, 2), strict=False)):
        out, lse = cache.append_and_attend(numbers(1, SHAPE.kv_heads * SHAPE.group) + step, keys, values)
        if step % 23 == 0:
            yield cache, out, lse


@pytest.mark.parametrize("window", (None, 90))
@pytest.mark.parametrize("name", SCHEMES)
def test_sequences_that_are_alike_are_read_as_any(
    name: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = build(kvdsl.load(name), SHAPE, backend="torch")
    found = [(out, lse) for _, out, lse in steps(kernels, window)]
    plain = TorchModule._span

    def span(self: TorchModule, state: AttentionState, queries: int) -> tuple[AttentionState, Span]:
        state, found = plain(self, state, queries)
        return state, found._replace(alike=False, masked=True)

    monkeypatch.setattr(TorchModule, "_span", span)
    for (out, lse), (_, each_out, each_lse) in zip(found, steps(kernels, window), strict=True):
        torch.testing.assert_close(out, each_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, each_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_a_page_are_packed_as_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = build(kvdsl.load(name), SHAPE, backend="torch")
    held = [cache.pool.bytes[: 1 + cache.pool.in_use].clone() for cache, _, _ in steps(kernels)]
    monkeypatch.setattr(SideLayout, "rowwise", False)
    for rows, (cache, _, _) in zip(held, steps(kernels), strict=True):
        assert torch.equal(rows, cache.pool.bytes[: 1 + cache.pool.in_use])


def test_a_step_packs_the_tokens_that_are_due_and_gathers_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = build(kvdsl.load("kivi4"), SHAPE, backend="torch")
    cache = QuantizedCache(kernels, 2)
    cache.append(numbers(150), numbers(150, 2))
    packed: list[int] = []
    module = kernels.module
    assert isinstance(module, TorchModule)
    pack = module.module.pack_values

    def counted(x: Tensor) -> Any:
        packed.append(x.shape[2])
        return pack(x)

    monkeypatch.setattr(module.module, "pack_values", counted)
    for slow in ("_exact_rows", "_seen"):
        monkeypatch.setattr(TorchModule, slow, lambda *_: pytest.fail("sequences that are alike were read one by one"))
    monkeypatch.setattr(TorchPages, "_pack_pages", lambda *_: pytest.fail("a whole page was packed"))
    for _ in range(3):
        cache.append_and_attend(numbers(1, SHAPE.kv_heads * SHAPE.group), numbers(1), numbers(1, 2))
    assert packed == [1, 1, 1]


def test_what_is_packed_is_told_by_sequence_not_by_the_host_s_bounds() -> None:
    kernels = build(kvdsl.load("int8_token_head"), SHAPE, backend="torch")
    rows, zeros = numbers(64), torch.zeros(2, dtype=torch.int32)
    pools = [torch.zeros(3, kernels.page_bytes, dtype=torch.uint8) for _ in range(2)]
    table = torch.tensor([[1], [2]], dtype=torch.int32)
    for pool, reach in zip(pools, ((5, 7), (0, 64)), strict=True):
        kernels.pack("keys", rows, zeros, 0, zeros + 5, zeros + 7, reach, pool, table, {})
    assert torch.equal(*pools) and pools[0].any()
