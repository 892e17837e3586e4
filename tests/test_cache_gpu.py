"""Laws of a cache on a GPU: growth at a fixed address, no waiting for the device, the same bytes as on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from cache_cases import SCHEMES, SHAPE, attention, numbers, pair
from merge_cases import SCHEMES as MERGED
from merge_cases import alike

from kvdsl.errors import CacheError
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.reserve import Reservation
from kvdsl.scheme import SIDES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIB = 1 << 20


def test_memory_grows_where_it_is() -> None:
    """Much more than the device has can be reserved; committing adds memory at the same address, keeps what is there,
    refuses what the device has not, and all of it goes back at the end."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    space = Reservation(1 << 40, device)
    assert space.mapped is not None
    for size in range(1, 5):
        space.commit(size * 64 * MIB)
        assert size * 64 * MIB <= space.committed <= size * 64 * MIB + 4 * MIB
        space.tensor[(size - 1) * 64 * MIB : size * 64 * MIB].fill_(size)
    assert 200 * MIB < free - torch.cuda.mem_get_info()[0] < 400 * MIB
    for size in range(1, 5):
        assert bool((space.tensor[(size - 1) * 64 * MIB : size * 64 * MIB] == size).all())
    held = space.committed
    with pytest.raises(CacheError, match="more bytes cannot be had"):
        space.commit(1 << 40)
    assert space.committed == held and bool((space.tensor[: 64 * MIB] == 1).all())
    del space
    gc.collect()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] < 100 * MIB


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gpu_stores_what_the_cpu_stores(name: str) -> None:
    """The same appends, crops and reorders give the same bytes and numbers on both, and the same attention."""
    from kvdsl.codegen import build

    caches = [
        QuantizedCache(build(SCHEMES[name], SHAPE, backend="triton"), 2, device="cuda"),
        QuantizedCache(build(SCHEMES[name], SHAPE, backend="torch"), 2, device="cpu"),
    ]
    assert caches[0].pool.committed < 64 * MIB
    keys, values = pair(2, 330)
    query = numbers(2, 330, heads=4, seed=4)
    at = 0
    for chunk in (3, 70, 1, 1, 16, 17, 100, 1, 1, 90, 1):
        span = slice(at, at + chunk)
        out = [
            c.append_and_attend(
                *(x[:, :, span].to(c.device) for x in (query, keys, values)), counts=(chunk, chunk // 2)
            )
            for c in caches
        ]
        at += chunk
        hidden = chunk - chunk // 2
        torch.testing.assert_close(out[0][0][0].cpu(), out[1][0][0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(out[0][0][1, :, hidden:].cpu(), out[1][0][1, :, hidden:], rtol=2e-3, atol=2e-3)
    for c in caches:
        c.crop([at - 40, 100])
        c.reorder([1, 0])
        c.append(*(x[:, :, :50].to(c.device) for x in (keys, values)))
    for side in SIDES:
        assert torch.equal(caches[0].dense(side).cpu(), caches[1].dense(side))
    for ids, others in zip(*(c._now.table.ids for c in caches), strict=True):
        assert torch.equal(caches[0].pool.bytes[list(ids)].cpu(), caches[1].pool.bytes[list(others)])
    state = caches[0].state()
    asked = numbers(2, 1, heads=4).cuda()
    seen, _ = caches[0].attend(asked, state)
    length = caches[0].lengths[0]
    dense = [caches[0].dense(side)[:1, :, -length:] for side in SIDES]
    torch.testing.assert_close(
        seen[:1].double().cpu(), attention(asked[:1].cpu(), dense[0].cpu(), dense[1].cpu()), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_no_step_waits_for_the_device(name: str) -> None:
    """Appending and attending, a token or a chunk, ragged or not, across page borders: nothing synchronises."""
    from kvdsl.codegen import build

    cache = QuantizedCache(build(SCHEMES[name], SHAPE, backend="triton"), 2, device="cuda", window=200)
    keys, values = (x.cuda().contiguous() for x in pair(2, 100))
    query = numbers(2, 100, heads=4).cuda()
    for strict in (False, True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            cache.append_and_attend(query, keys, values, counts=(100, 37))
            for i in range(80):
                span = slice(i, i + 1)
                cache.append_and_attend(query[:, :, span], keys[:, :, span], values[:, :, span])
            cache.append_and_attend(query, keys, values)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_graph_holds_a_step(name: str) -> None:
    """One captured step, replayed for tokens of a ragged batch and again behind a prompt: what appends alone leave and
    attend to, to the bit where splits are the same."""
    from kvdsl.codegen import build
    from kvdsl.static_cache import StaticCache
    from kvdsl.testing.caches import require_same

    kernels = build(SCHEMES[name], SHAPE, backend="triton")
    keys, values = (x.cuda() for x in pair(2, 330))
    queries = numbers(2, 330, heads=4, seed=4).cuda()
    told, cache = (QuantizedCache(kernels, 2, capacity=400, device="cuda") for _ in range(2))
    static, graph = StaticCache(cache, 330), torch.cuda.CUDAGraph()
    given = [x[:, :, :1].clone() for x in (queries, keys, values)]
    static.begin()
    for _ in range(2):  # what is compiled, and where it was
        static.step(*given, splits=2)
    cache.reset()
    static.begin()
    with torch.cuda.graph(graph):
        out, _ = static.step(*given, splits=2)
    for begin, prompt, end in ((0, 40, 120), (120, 230, 330)):
        for each in (told, cache):
            counts = (prompt - begin, prompt - begin - 7)
            each.append(keys[:, :, begin:prompt], values[:, :, begin:prompt], counts=counts)
        static.begin()
        for at in range(prompt, end):
            fresh = [x[:, :, at : at + 1] for x in (queries, keys, values)]
            for place, one in zip(given, fresh, strict=True):
                place.copy_(one)
            graph.replay()
            state = told.append(*fresh[1:])
            assert torch.equal(out, kernels.attend(fresh[0], state, told.params, splits=2)[0])
        static.settle()
        require_same(f"behind {end} tokens", cache, told)


@pytest.mark.parametrize("name", MERGED)
def test_rows_that_share_a_program_are_merged_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alike(name, monkeypatch, "cuda")
