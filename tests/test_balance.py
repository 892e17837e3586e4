"""Tiles with factors along both axes: what KVarN is made of, and where its released bounds fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kvdsl
from kvdsl import reference
from kvdsl.errors import SchemeError
from kvdsl.reference import balance
from kvdsl.scheme import (
    Balance,
    Codebook,
    PreRope,
    Recent,
    Rotate,
    Scheme,
    Sinks,
    Store,
    Transform,
    Uniform,
    per_channel,
    per_token,
)
from kvdsl.schemes import kvarn_even, kvarn_k2v2

TILES = Scheme(
    keys=Store(Uniform(2), scale=per_channel(tokens=32), transform=(Rotate("hadamard"), Balance(32))),
    values=Store(Uniform(2), scale=per_token(), transform=Balance(32)),
    sinks=Sinks(3),
    recent=Recent(32),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "error"), [(2, 0.246), (3, 0.0450), (4, 0.0098)])
def test_errors_on_normal_tiles(bits: int, error: float) -> None:
    x = normal(1, 1, 2048, 128)
    for side in (kvarn_k2v2.keys, kvarn_k2v2.values):
        got = reference.quantize(side.with_(**{"code.bits": bits}), x).decoded
        assert (got - x).square().mean().item() == pytest.approx(error, rel=0.01)


def test_factors_bring_tokens_to_like_sizes() -> None:
    """Of tokens of other sizes each their product with the other factors comes out near 1 along both axes."""
    x = (normal(1, 1, 128, 64) * torch.linspace(1, 9, 128)[:, None] * torch.linspace(3, 1, 64)).double()
    for of_tokens in (True, False):
        part = Balance(128)
        each = balance.spread(balance.balancing(x, part, of_tokens=of_tokens), part, of_tokens=of_tokens)
        sizes = balance.divided(x, each).std(-1 if of_tokens else -2)
        assert sizes.amax() / sizes.amin() < 1.35  # noise of 64 or 128 numbers; it was 9 and 3


@pytest.mark.parametrize("of_tokens", [True, False])
def test_the_order_of_sums_chooses_nothing(of_tokens: bool) -> None:
    """Of tokens with a common offset one channel, after rotation, holds nearly all of them: rounds end at the bounds,
    as uneven as each other but for rounding, and a GPU once took another one than a CPU."""
    for seed in range(8):
        x = normal(1, 1, 128, 32, seed=seed).double()
        x[..., 0] += 20 * 32**0.5
        there, back = (balance.balancing(y, Balance(128), of_tokens=of_tokens) for y in (x, x.flip(2, 3)))
        assert torch.equal(there, back.flip(-1))


@pytest.mark.parametrize(("gain", "error"), [(4.0, 0.248), (1.0, 0.36), (0.3, 1.91), (0.1, 4.20)])
def test_the_released_bounds_depend_on_the_size_of_numbers(gain: float, error: float) -> None:
    """Tokens of lognormal sizes, mean error of a token: the bound e^-0.3 turns balancing off where they are small."""
    x = normal(1, 1, 4096, 128) * (0.7 * normal(1, 1, 4096, 1, seed=1)).exp() * gain
    got = reference.quantize(kvarn_k2v2.keys, x).decoded
    found = ((got - x).square().sum(-1) / x.square().sum(-1)).mean().item()
    assert found == pytest.approx(error, rel=0.12)


@pytest.mark.parametrize("gain", [0.03, 0.3, 1.0, 4.0])
def test_over_a_tiles_own_size_they_do_not(gain: float) -> None:
    x = normal(1, 1, 1024, 128) * (0.7 * normal(1, 1, 1024, 1, seed=1)).exp() * gain
    for side in (kvarn_even.keys, kvarn_even.values):
        got = reference.quantize(side, x).decoded
        found = ((got - x).square().sum(-1) / x.square().sum(-1)).mean().item()
        assert found == pytest.approx(0.247, rel=0.02)


def test_every_length_keeps_what_fills_no_tile_exact() -> None:
    """The last tile goes when it is full; the factors of a tile are those of its own tokens at any length."""
    k, v = normal(1, 1, 100, 32, seed=2), normal(1, 1, 100, 32, seed=3)
    for tokens in (1, 3, 4, 34, *range(67, 99)):
        held = kvdsl.roundtrip(TILES, k[:, :, :tokens], v[:, :, :tokens])
        packed = 3 + max(0, tokens - 3) // 32 * 32
        for x, got in zip((k, v), held, strict=True):
            assert torch.equal(got[:, :, :3], x[:, :, : min(3, tokens)]) and not got.isnan().any()
            assert torch.equal(got[:, :, packed:], x[:, :, packed:tokens])
            if packed > 3:
                assert (got[:, :, 3:packed] != x[:, :, 3:packed]).any(-1).all()


@pytest.mark.parametrize("number", [0.0, 1.0, -3.5, 1e-2])
def test_a_constant_tile_is_its_constant(number: float) -> None:
    """Deviations of 0 are taken as the least one, so that nothing is divided by 0."""
    x = torch.full((1, 1, 32, 32), number)
    for part in (Balance(32), Balance(32, unit="rms", low=-10.0)):
        for scale in (per_channel(tokens=32), per_token()):
            store = Store(Uniform(2), scale=scale, transform=part)
            got = reference.quantize(store, x).decoded
            assert torch.allclose(got, x.double(), rtol=2**-9, atol=2**-24)


def test_an_infinity_saturates_before_it_is_divided() -> None:
    """By a factor of a thousand, which its decoded number is multiplied by again."""
    side = Store(Uniform(1), scale=per_channel(tokens=32), transform=Balance(32, loops=1))
    scheme = Scheme(both=side, recent=Recent(32), source="test")
    k = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    k[0, 0, 3, 5] = torch.inf
    for roundtrip in (reference.roundtrip, kvdsl.roundtrip):
        assert 65000 < roundtrip(scheme, k, k)[0][0, 0, 3, 5] < 66000


def test_packed_tiles_are_those_of_the_definition() -> None:
    """Zeros and single large tokens among them, one whose rotated numbers are beyond float16, and half-full tiles
    behind."""
    k = normal(2, 2, 120, 32, seed=4).half()
    k[0, :, 40:44], k[1, 0, 50], k[1, 1, 7] = 0, 600, 60000
    for packed, defined in zip(kvdsl.roundtrip(TILES, k, k), reference.roundtrip(TILES, k, k), strict=True):
        assert torch.equal(packed.double(), defined)


def keys(*transform: Transform, scale: object = None, code: object = None, **more: object) -> Scheme:
    store = Store(code or Uniform(2), scale=scale or per_channel(tokens=32), transform=transform, **more)  # type: ignore
    return Scheme(keys=store, values=Store(), recent=Recent(32))


def test_what_is_refused() -> None:
    wrong: dict[str, Callable[[], Scheme]] = {
        "put Balance\\(\\) last, once": lambda: keys(Balance(32), Rotate("hadamard")),
        "beside a scale along the other axis alone; use per_channel\\(tokens=32\\)": lambda: keys(
            Balance(32), scale=per_token()
        ),
        "positions and angles": lambda: keys(PreRope(), Balance(32)),
        "evenly spaced": lambda: keys(Balance(32), code=Codebook(2, "normal")),
        "has all of a vector": lambda: keys(Balance(32), residual=Store(Uniform(2), scale=per_token())),
        "use 0 or less": lambda: keys(Balance(32, low=1.0, high=0.0)),
        "no exponent of e": lambda: keys(Balance(32, low=-100.0)),
        "add recent=Recent\\(32\\)": lambda: Scheme(
            keys=Store(), values=Store(Uniform(2), scale=per_token(), transform=Balance(32))
        ),
    }
    for words, made in wrong.items():
        with pytest.raises(SchemeError, match=words):
            made()
