"""Shared values: a token's record is its key and, in its first stretch, its value; what is refused of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl import reference
from kvdsl.codegen import build
from kvdsl.context_rules import faults
from kvdsl.quantized_cache import QuantizedCache
from kvdsl.scheme import (
    DROP,
    Bands,
    Float,
    Recent,
    Saliency,
    Scheme,
    Shared,
    Store,
    Tier,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import ALL
from kvdsl.shape import Shape, usual

LATENT = Store(Float("e4m3"), scale=per_token(channels=32, dtype="fp32"))
RECORD = Scheme(keys=Store(Bands((LATENT, Store()), channels=(64, 32))), values=Store(Shared()))


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize(("name", "size"), [("mla_fp8", 656), ("mla_nvfp4", 352)])
def test_a_record_takes_the_bytes_that_are_published(name: str, size: int) -> None:
    kernels = build(ALL[name], usual(ALL[name]), "torch")
    assert kernels.page_bytes == size * kernels.page_tokens
    assert kernels.shape == Shape(576, 1, 32)


def test_a_record_is_the_latent_then_the_key_with_positions_then_scales() -> None:
    """By hand: 64 codes of e4m3 a token, rows of 32 float16, two scales a token, group by group."""
    k = numbers(1, 1, 64, 96)
    (page,) = reference.pages(RECORD, Shape(96, 1), k, k[..., :64])[0]
    rotary = torch.from_numpy(page[64 * 64 : 64 * 64 + 64 * 64].copy()).view(torch.float16).reshape(64, 32)
    assert torch.equal(rotary, k[0, 0, :, 64:])
    scales = torch.from_numpy(page[2 * 64 * 64 :].copy()).view(torch.float32).reshape(2, 64)
    largest = k[0, 0, :, :64].float().unflatten(-1, (2, 32)).abs().amax(-1).T
    assert torch.equal(scales, (largest.double() / 448).float())


@pytest.mark.parametrize("name", ["mla_fp8", "mla_nvfp4"])
def test_a_latent_of_one_number_or_of_zeros_is_kept(name: str) -> None:
    """A block of zeros has a scale of 0, and nothing is divided by it, or the least one that is stored."""
    k = torch.zeros(1, 1, 3, 576)
    k[:, :, 1], k[:, :, 2, 64:] = 1.5, -3.0  # over 6 a power of two
    keys, values = kvdsl.roundtrip(ALL[name], k, k[..., :512], backend="torch")
    assert torch.equal(keys, k) and torch.equal(values, k[..., :512])


def test_a_floor_of_scales_keeps_small_latents() -> None:
    """Half of 2^-9, the least number of e4m3, times 6: latents up to that had a scale of 0 and were lost without it."""
    k = torch.zeros(1, 1, 1, 576)
    k[..., :512] = torch.tensor([0.5, 1, -1.5, 2]).repeat(128) * 2.0**-9
    kept, lost = (
        kvdsl.roundtrip(one, k, k[..., :512], backend="torch")[1]
        for one in (ALL["mla_nvfp4"], ALL["mla_nvfp4"].with_(floor=0.0))
    )
    assert torch.equal(kept, k[..., :512]) and not lost.any()


def test_values_are_read_where_keys_stand() -> None:
    """Nothing is written for them: packing keys alone fills a page, packing values changes none."""
    shape, k = Shape(96, 2, 4), numbers(1, 2, 64, 96)
    kernels = build(RECORD, shape, "torch")
    cache = QuantizedCache(kernels, 1, capacity=256)
    cache.append(k, k[..., :64].contiguous())
    right = torch.from_numpy(reference.pages(RECORD, shape, k, k[..., :64]))
    assert torch.equal(cache.pool.bytes[cache.pages()[0][0, 0]], right[0, 0])
    assert torch.equal(cache.dense("values"), cache.dense("keys")[..., :64])
    assert cache.bits() == 8 * cache.nbytes / (2 * 2 * 96 * 64)


def test_other_values_than_the_keys_own_are_refused() -> None:
    k = numbers(1, 1, 8, 96)
    with pytest.raises(
        kvdsl.ShapeError, match=r"v: other numbers than the first 64 channels of k.*give k\[\.\.\., :64\]"
    ):
        kvdsl.roundtrip(RECORD, k, numbers(1, 1, 8, 64, seed=1), backend="torch")
    with pytest.raises(kvdsl.ShapeError, match="v: shape .1, 1, 8, 96. is not"):
        kvdsl.roundtrip(RECORD, k, k, backend="torch")


KEYS = RECORD.keys
FAULTS = {
    "values.code: nothing says which channels of the keys they are; store keys in Bands((..., ...), "
    "channels=(512, 64))": (lambda: Scheme(keys=Store(), values=Store(Shared()))),
    "keys.code: only values are shared, and all of them; write values=Store(Shared())": (
        lambda: Scheme(keys=Store(Shared()), values=Store())
    ),
    "values.scale: shared values are as the keys have them; leave scale out": (
        lambda: Scheme(keys=KEYS, values=Store(Shared(), scale=per_token()))
    ),
    "values.code: tiers store keys and values of their own, and these values are a stretch of the keys; leave tiers, "
    "router and requantize out": (
        lambda: RECORD.with_(tiers=(Tier(top=0.2), DROP), router=Saliency("accumulated", moves="down"))
    ),
    "keys.code.channels[0]: 48 channels are no multiple of 32; use 64": (
        lambda: RECORD.with_(**{"keys.code.channels": (48, 32)})
    ),
    "keys.code.channels: 3 stretches for 2 stores; give 2 counts": (
        lambda: RECORD.with_(**{"keys.code.channels": (32, 32, 32)})
    ),
    "keys.code.stores[0].scale.block.tokens: a group of 32 tokens must wait until it is full; add recent=Recent(32)": (
        lambda: Scheme(
            keys=Store(Bands((Store(Uniform(4), scale=per_channel(tokens=32)), Store()), channels=(64, 32))),
            values=Store(Shared()),
        )
    ),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_what_means_nothing_is_refused(sentence: str) -> None:
    with pytest.raises(kvdsl.SchemeError) as refusal:
        FAULTS[sentence]()
    assert str(refusal.value) == sentence


def test_what_fits_no_shape_is_refused() -> None:
    with pytest.raises(kvdsl.SchemeError) as refusal:
        kvdsl.bits(RECORD, head_dim=128)
    assert str(refusal.value) == (
        "keys.code.channels: stretches of 64 and 32 channels are 96 together, and head_dim is 128; use head_dim=96, or "
        "other counts"
    )
    with pytest.raises(kvdsl.SchemeError, match="keys.code: head_dim 576 is more than the 256 that are read as one"):
        kvdsl.bits(ALL["token4"], head_dim=576)
    assert [fault.place for fault in faults(RECORD)] == ["values.code"]


def test_a_window_is_of_both() -> None:
    """Exact tokens are rows of either side; the record leaves the window whole, as its slowest stretch asks."""
    slow = Store(Uniform(4), scale=per_channel(tokens=32))
    keys = Store(Bands((Store(Uniform(8), scale=per_token()), slow), channels=(64, 32)))
    scheme = Scheme(keys=keys, values=Store(Shared()), recent=Recent(32))
    k, q = numbers(1, 1, 70, 96), numbers(1, 3, 2, 96, seed=1)
    got, _ = kvdsl.attend(scheme, q, k, k[..., :64].contiguous(), backend="torch")
    want, _ = reference.attend(scheme, q, k, k[..., :64])
    assert (got - want).abs().max() < 1e-3
    cache = QuantizedCache(build(scheme, Shape(96, 1), "torch"), 1, capacity=256)
    cache.append(k, k[..., :64].contiguous())
    assert cache.packed("keys") == cache.packed("values") == (64,)
