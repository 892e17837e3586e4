"""One context over the ranks of a group: what each process runs, and the same in one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from kvdsl.api import calibrate
from kvdsl.codegen import build
from kvdsl.context import ContextCache
from kvdsl.kernels import KernelSet, Params, Places
from kvdsl.merging import merged
from kvdsl.params import ROPE
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.registry import load
from kvdsl.scheme import SIDES, Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token
from kvdsl.shape import Shape

SHAPE = Shape(64, kv_heads=2, q_heads=4, dtype="fp32")
LONG = Shape(64, kv_heads=1, q_heads=2, dtype="fp32")
OWN = {
    "windows": Scheme(
        keys=Store(Uniform(bits=4), scale=per_channel(tokens=32)),
        values=Store(Uniform(bits=4), scale=per_token()),
        recent=Recent(160),
        sinks=Sinks(3),
    ),
    "stored": Scheme(
        keys=Store(Uniform(bits=4), scale=per_channel(tokens=32)),
        values=Store(Uniform(bits=2), scale=per_token(channels=16)),
        recent=Recent(32),
        sinks=Sinks(2),
        prefill="stored",
    ),
}


class Step(NamedTuple):
    """A step of m tokens and Q queries, of which each sequence takes counts_b."""

    tokens: int
    queries: int
    counts: tuple[int, ...] | None = None


EVEN = [Step(500, 500), *[Step(1, 1)] * 5, Step(90, 7), *[Step(1, 1)] * 3, Step(0, 1)]
RAGGED = [
    Step(421, 421, (421, 37)), *[Step(1, 1)] * 3, Step(70, 70, (70, 11)), Step(1, 1, (0, 1)), Step(200, 33, (130, 200)),
    *[Step(1, 1)] * 2, Step(0, 9),
]  # fmt: skip


def scheme_of(name: str) -> Scheme:
    return OWN[name] if name in OWN else load(name)


def numbers(batch: int, heads: int, tokens: int, dim: int, seed: int) -> Tensor:
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def steps(shape: Shape, batch: int, plan: Sequence[Step], at: int = 0) -> Iterator[tuple[Step, Tensor, Tensor, Tensor]]:
    """Each step with its query, keys and values; `at`: the number of the first."""
    for number, step in enumerate(plan, at):
        sizes = ((shape.q_heads or 0, step.queries), (shape.kv_heads, step.tokens), (shape.kv_heads, step.tokens))
        query, keys, values = (
            numbers(batch, heads, tokens, shape.head_dim, 3 * number + i) for i, (heads, tokens) in enumerate(sizes)
        )
        yield step, query, keys, values


@cache
def compiled(name: str, shape: Shape = SHAPE) -> tuple[KernelSet, Params]:
    scheme = scheme_of(name)
    waves = {ROPE: 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)} if scheme.keys.rope else {}
    given = numbers(1, shape.kv_heads, 256, shape.head_dim, 77), numbers(1, shape.kv_heads, 256, shape.head_dim, 78)
    return build(scheme, shape, backend="torch"), calibrate(scheme, *given, given[0], params=waves, gradients=given)


def fresh(name: str, batch: int, shape: Shape = SHAPE, **options: Any) -> QuantizedCache:
    kernels, params = compiled(name, shape)
    return QuantizedCache(kernels, batch, device="cpu", params=params, **{"capacity": 4096, **options})


def driven(
    cache: Any, batch: int, plan: Sequence[Step], shape: Shape = SHAPE, at: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """What attention gives step by step."""
    found = []
    for step, query, keys, values in steps(shape, batch, plan, at):
        if step.tokens:
            found.append(cache.append_and_attend(query, keys, values, counts=step.counts))
        elif isinstance(cache, ContextCache):
            found.append(cache.attend(query))
        else:
            found.append(cache.attend(query, cache.state()))
    return found


def held(cache: QuantizedCache, hidden: int = 0, places: Places | None = None) -> dict[str, Any]:
    """Of each sequence the pages in order, how many keys and values are packed, and all tokens as they are stored,
    without the first `hidden` ones."""
    dense = {side: cache.dense(side, places) for side in SIDES}
    return {
        "pages": [[cache.pool.bytes[page].clone() for page in ids] for ids in cache._now.table.ids],
        "packed": list(zip(cache.packed("keys"), cache.packed("values"), strict=True)),
        **{
            side: [x[b, :, x.shape[2] - n + hidden :].clone() for b, n in enumerate(cache.lengths)]
            for side, x in dense.items()
        },
    }


# -- in one process --------------------------------------------------------------------------------------------------


class Alone:
    """What stands for an Exchange where one process plays all ranks: parts are kept, to be merged by `Ranks`."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.sent = rank, ranks, 0
        self.parts: tuple[Tensor, Tensor] | None = None

    def agree(self, what: str, given: Any, error: BaseException | None) -> None:
        if error is not None:
            raise error

    def merge(self, out: Tensor, lse: Tensor, *, failed: bool | None = None) -> tuple[Tensor, Tensor, list[int]]:
        self.parts = out, lse
        return out, lse, []


class Ranks:
    """All ranks of a group in one process."""

    def __init__(self, ranks: int, caches: Callable[[], QuantizedCache], monkeypatch: Any, **options: Any) -> None:
        self.every = []
        for rank in range(ranks):
            monkeypatch.setattr("kvdsl.context.Exchange", lambda group, device, rank=rank: Alone(rank, ranks))
            self.every.append(ContextCache(caches(), **options))

    def append_and_attend(self, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        for one in self.every:
            one.append_and_attend(*given, **options)
        return self._merged()

    def attend(self, query: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        for one in self.every:
            one.attend(query)
        return self._merged()

    def _merged(self) -> tuple[Tensor, Tensor]:
        parts = [one.exchange.parts for one in self.every]  # type: ignore[attr-defined]
        out, lse = merged(*(torch.stack(each).float() for each in zip(*parts, strict=True)))
        return out.to(parts[0][0].dtype), lse

    def state(self) -> None:
        """Nothing: each rank has its own."""


# -- in several processes --------------------------------------------------------------------------------------------


def run(ranks: int, work: Callable[..., Any], folder: Path, *given: Any) -> list[Any]:
    """What `work(*given)` gives in each of as many processes, which are the ranks of a group."""
    started: Any = spawn(_rank, (ranks, work, folder, given), nprocs=ranks, join=False)
    while not started.join(timeout=120):
        pass
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Callable[..., Any], folder: Path, given: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may lead nowhere
    where, most = f"file://{folder / 'store'}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=most)
    try:
        torch.save(work(*given), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def all_of(names: Sequence[str], tokens: int) -> dict[str, Any]:
    """Everything that is asked of one group of processes, which take seconds to start."""
    found: dict[str, Any] = {"refused": refused(), "exchange": exchanged(), "long": long(tokens)}
    for name in names:
        for plan, batch in PLANS.items():
            placed = scheme_of(name).keys.rope is not None
            cache = ContextCache(fresh(name, batch, replace(SHAPE, placed=placed)))
            attended = driven(cache, batch, plan_of(plan))
            found[f"{name} {plan}"] = {
                "attended": attended,
                "held": held(cache.cache, cache.sinks if cache.rank else 0, cache._places(cache._spreads)),
                "spreads": [[tuple(one) for one in spread.stretches] for spread in cache._spreads],
                "lengths": cache.lengths,
                "own": cache.own,
            }
    return found


def long(tokens: int) -> dict[str, Any]:
    """A prompt, then tokens one by one."""
    cache = ContextCache(fresh("kivi2", 1, LONG, capacity=tokens))
    keys, values = (numbers(1, 1, tokens, LONG.head_dim, seed) for seed in (1, 2))
    cache.append(keys, values)
    return {"attended": driven(cache, 1, [Step(1, 1)] * 3, LONG), "own": cache.own, "stats": cache.stats()}


def one_long(tokens: int) -> list[tuple[Tensor, Tensor]]:
    cache = fresh("kivi2", 1, LONG, capacity=2 * tokens)
    keys, values = (numbers(1, 1, tokens, LONG.head_dim, seed) for seed in (1, 2))
    cache.append(keys, values)
    return driven(cache, 1, [Step(1, 1)] * 3, LONG)


def written() -> int:
    """Bytes that this process has written, into sockets too."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def exchanged() -> dict[tuple[int, int, bool], tuple[int, int, int]]:
    """By the context's length, the queries and whether steps are checked: bytes that a step should send, those that it
    counted, and those that the process wrote."""
    found = {}
    for checked in (True, False):
        for tokens in (100, 3000):
            cache = ContextCache(fresh("token4", 2), checked=checked)
            cache.append(*(numbers(2, 2, tokens, 64, seed) for seed in (1, 2)))
            for queries in (1, 5):
                query, keys, values = (numbers(2, heads, queries, 64, 9) for heads in (4, 2, 2))
                cache.append_and_attend(query, keys, values)
                dist.barrier()
                counted, before = cache.exchange.sent, written()
                cache.append_and_attend(query, keys, values)
                found[tokens, queries, checked] = (
                    cache.step_bytes(queries),
                    cache.exchange.sent - counted,
                    written() - before,
                )
                dist.barrier()
    return found


def refused() -> dict[str, str]:
    """What each rank says where ranks differ, or one of them cannot go on."""
    rank, found = dist.get_rank(), {}

    def tried(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "done"

    tried("turn", lambda: ContextCache(fresh("token4", 1), turn=64 * (1 + rank)))
    tried("scheme", lambda: ContextCache(fresh(("token4", "token2")[rank % 2], 1)))
    tried("window", lambda: ContextCache(fresh("token4", 1, window=9 if rank else None)))
    cache = ContextCache(fresh("token4", 2, capacity=256))
    query, keys, values = (numbers(2, heads, 30, 64, 5) for heads in (4, 2, 2))
    cache.append(keys, values)
    before = held(cache.cache)
    tried("counts", lambda: cache.append(keys, values, counts=(30, 20 + rank)))
    tried("queries", lambda: cache.attend(query[:, :, rank:]))
    tried("dtype", lambda: cache.append_and_attend(query, keys.half() if rank else keys, values))
    tried("call", lambda: cache.attend(query) if rank else cache.append(keys, values))
    tried("full", lambda: cache.append(*(numbers(2, 2, 2000, 64, 3) for _ in range(2))))
    partial = cache._partial

    def fail(*given: Any) -> Any:
        raise MemoryError("no memory")

    if rank == 1:
        cache._partial = fail  # type: ignore[method-assign, assignment]
    tried("failure", lambda: cache.append_and_attend(query, keys, values))
    cache._partial = partial  # type: ignore[method-assign]
    same = all(
        torch.equal(*pair)
        for side in ("keys", "values")
        for pair in zip(before[side], held(cache.cache)[side], strict=True)
    )
    found["unchanged"] = str(same and cache.lengths == (30, 30))
    tried("after", lambda: cache.append_and_attend(query, keys, values))
    return found


PLANS = {"even": 1, "ragged": 2}
"""Sequences of each plan."""


def plan_of(name: str) -> list[Step]:
    return EVEN if name == "even" else RAGGED
