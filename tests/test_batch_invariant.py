"""`batch_invariant=True`: attention gives a sequence what it gives it alone, to the bit, on either backend."""

from __future__ import annotations

import pytest
import torch
from invariance_cases import SCHEMES, alone_and_together

from kvdsl.codegen import build, build_tiers
from kvdsl.errors import CacheError
from kvdsl.kernels import fixed_splits
from kvdsl.making import made
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.schemes import h2o, token4
from kvdsl.shape import Shape


@pytest.mark.parametrize("name", SCHEMES)
def test_neighbours_change_no_bit(name: str) -> None:
    for alone, together in alone_and_together(name, "torch"):
        assert torch.equal(alone, together)


def test_a_capacity_alone_tells_how_many_share() -> None:
    assert [fixed_splits(capacity, 64) for capacity in (1, 128, 129, 1024, 4096, 131072)] == [1, 1, 2, 8, 32, 32]
    kernels = build(token4, Shape(64, 2, 4), "torch")
    for batch in (1, 5):
        assert QuantizedCache(kernels, batch, capacity=1024, batch_invariant=True).splits == 8
        assert QuantizedCache(kernels, batch, capacity=1024).splits is None
    assert QuantizedCache(kernels, 2, capacity=1024, batch_invariant=True).fork([0]).splits == 8


def test_tiers_refuse() -> None:
    shape = Shape(64, 2, 4)
    with pytest.raises(CacheError, match="batch_invariant: which tokens go to which tier"):
        made(h2o, shape, 2, build, build_tiers, backend="torch", batch_invariant=True)
    assert made(token4, shape, 2, build, build_tiers, backend="torch", batch_invariant=True).batch == 2


def test_a_model_hands_it_down() -> None:
    from tiny import generated, model, prompt

    from kvdsl.hf import cache

    network = model("llama")
    held = cache(token4, network, capacity=256, batch_invariant=True)
    generated(network, prompt(), held)
    assert {layer.packed.splits for layer in held.layers} == {2}
    with pytest.raises(CacheError, match="batch_invariant"):
        cache(h2o, network, batch_invariant=True)
