"""Schemes, numbers and views shared by the tests of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvdsl.kernels import KernelSet
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import Recent, Scheme, Sinks, Store, Uniform, per_channel, per_token
from kvdsl.shape import Shape

HEADS, DIM = 2, 32
SHAPE = Shape(DIM, kv_heads=HEADS, q_heads=4, dtype="fp32")
TOKEN = Store(Uniform(bits=4), scale=per_token(range="absmax"))
SCHEMES = {
    "whole": Scheme(
        keys=Store(Uniform(bits=4), scale=per_channel(tokens=16)),
        values=Store(Uniform(bits=4), scale=per_token()),
        recent=Recent(32),
        sinks=Sinks(3),
    ),
    "rolling": Scheme(both=TOKEN, recent=Recent(5), sinks=Sinks(2)),
    "bare": Scheme(both=TOKEN),
    "stored": Scheme(
        keys=Store(Uniform(bits=4), scale=per_channel(tokens=32)),
        values=Store(Uniform(bits=2), scale=per_token(channels=16)),
        recent=Recent(32),
        prefill="stored",
    ),
}
EACH = pytest.mark.parametrize("name", SCHEMES)


def compiled(scheme: str | Scheme) -> KernelSet:
    """The torch kernels of a scheme, or of one of SCHEMES by its name."""
    from kvdsl.codegen import build

    return build(SCHEMES[scheme] if isinstance(scheme, str) else scheme, SHAPE, backend="torch")


def numbers(batch: int, tokens: int, *, heads: int = HEADS, seed: int = 0) -> Tensor:
    """Normal numbers (batch, heads, tokens, DIM); a prefix of the tokens does not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, batch, heads, DIM, generator=generator).permute(1, 2, 0, 3)


def pair(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    return numbers(batch, tokens, seed=seed), numbers(batch, tokens, seed=seed + 1000)


def filled(
    kernels: KernelSet, keys: Tensor, values: Tensor, cuts: Sequence[int] = (), **options: Any
) -> QuantizedCache:
    """A cache given all tokens, cut into chunks at `cuts`."""
    cache = QuantizedCache(kernels, keys.shape[0], **{"capacity": 2048, **options})
    edges = [0, *sorted(cuts), keys.shape[2]]
    for begin, end in zip(edges, edges[1:], strict=False):
        cache.append(keys[:, :, begin:end], values[:, :, begin:end])
    return cache


def view(cache: QuantizedCache) -> dict[str, Any]:
    """All that can be told about a cache from outside, and the bytes of its pages in the order of its sequences."""
    pages = [[cache.pool.bytes[page].clone() for page in ids] for ids in cache._now.table.ids]
    state = cache.state()
    return {
        "lengths": cache.lengths,
        "packed": (cache.packed("keys"), cache.packed("values")),
        "device": [t.tolist() for t in (state.length, state.packed_keys, state.packed_values, state.start)],
        "keys": cache.dense("keys"),
        "values": cache.dense("values"),
        "pages": [torch.stack(page) if page else torch.empty(0) for page in pages],
        "in_use": cache.pool.in_use,
        "holders": [cache.pool.holders(page) for page in cache.held()],
        "requantized": cache.requantized,
    }


def told(cache: QuantizedCache) -> dict[str, Any]:
    """The view without the raw pages, whose places behind the packed tokens mean nothing."""
    return {key: value for key, value in view(cache).items() if key != "pages"}


def same(one: Any, other: Any) -> bool:
    """Equality of views, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def content(cache: QuantizedCache, b: int) -> dict[str, Any]:
    """The view of one sequence, without what belongs to the pool."""
    whole = view(cache)
    length = cache.lengths[b]
    return {
        "length": length,
        "packed": (cache.packed("keys")[b], cache.packed("values")[b]),
        "keys": whole["keys"][b, :, whole["keys"].shape[2] - length :],
        "values": whole["values"][b, :, whole["values"].shape[2] - length :],
    }


def attention(query: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """Causal attention in float64 over dense tensors; the last query stands at the last token."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * query.shape[3] ** -0.5
    tokens, queries = keys.shape[2], query.shape[2]
    position = tokens - queries + torch.arange(queries)[:, None]
    token = torch.arange(tokens)[None]
    seen = token <= position
    if window is not None:
        seen &= token > position - window
    out: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out


class Failing(TorchDispatchMode):
    """Raises in the n-th tensor operation."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.error = at, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest new tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result
