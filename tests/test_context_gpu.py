"""A context over two GPUs, exchanged by NCCL, is one cache's on one GPU."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from kvdsl.codegen import build
from kvdsl.context import ContextCache
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.registry import load
from kvdsl.shape import Shape

RANKS, TOKENS, STEPS = 2, 65536, 12
SHAPE = Shape(128, kv_heads=8, q_heads=32)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")]


def _rank(rank: int, name: str, folder: str) -> None:
    """Both ranks; the first one also has it all in one cache, and says how long steps take."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    made = torch.Generator("cuda").manual_seed(0)

    def drawn(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, SHAPE.head_dim, device="cuda", generator=made).half()

    kernels = build(load(name), SHAPE, "triton")
    cache = ContextCache(QuantizedCache(kernels, 1, device="cuda", capacity=2 * TOKENS))
    alone = QuantizedCache(kernels, 1, device="cuda", capacity=2 * TOKENS)
    keys, values = drawn(8, TOKENS), drawn(8, TOKENS)
    cache.append(keys, values)
    alone.append(keys, values)
    took: dict[str, list[float]] = {"both": [], "alone": []}
    for _ in range(STEPS):
        query, key, value = drawn(32, 1), drawn(8, 1), drawn(8, 1)
        found: dict[str, Any] = {}
        for which, one in (("both", cache), ("alone", alone)):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            found[which] = one.append_and_attend(query, key, value)[0]
            torch.cuda.synchronize()
            took[which].append(time.perf_counter() - begin)
        torch.testing.assert_close(found["both"], found["alone"], rtol=0, atol=2e-3)
    if rank == 0:
        print(name, {which: f"{1e6 * sorted(times)[STEPS // 2]:.0f} us" for which, times in took.items()}, flush=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["kivi2", "token4", "turboquant3"])
def test_two_gpus_give_what_one_gives(name: str, tmp_path: Any) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast: not every machine lets processes set it up
    spawn(_rank, (name, str(tmp_path)), nprocs=RANKS, join=True)
