"""KVTC: bases that keep their first numbers alone, behind a mean, in stretches of falling bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kvdsl
from kvdsl import reference
from kvdsl.errors import SchemeError
from kvdsl.matrices import rotation
from kvdsl.rules import refuse_for
from kvdsl.scheme import Additive, Bands, ChannelShift, Eigenbasis, PreRope, Rotate, Scheme, Store, Uniform, per_token
from kvdsl.schemes.kvtc import kvtc2, kvtc2_before_rope
from kvdsl.shape import Shape

SIZES = 0.9 ** torch.arange(64.0)
KEPT = Store(Uniform(8), scale=per_token(), transform=(ChannelShift(), Eigenbasis("own", rank=0.75)))


def falling() -> Tensor:
    """Vectors of two kv heads around a mean, whose axes are each 0.9 times as long as the one before."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, 2, 300, 64, generator=draw) * SIZES @ rotation("orthogonal", 64, 5).float() + 3


def test_what_is_not_kept_is_read_as_the_mean() -> None:
    """x^ = m + U_r U_r^T (x - m): of 64 axes the 48 shortest are lost, of the mean nothing is."""
    x = falling()
    scheme = Scheme(both=KEPT).with_(rank=0.25)
    given = kvdsl.calibrate(scheme, x, x)
    mean, basis = given["keys.transform[0]"].double(), given["keys.transform[1]"][:, :16].double()
    assert basis.shape == (2, 16, 64) and given["keys.transform[1]"].shape == (2, 64, 64)
    want = mean[:, None] + (x - mean[:, None]) @ basis.mT @ basis
    got, _ = kvdsl.roundtrip(scheme, x, x, params=given)
    assert (want - x).square().mean() > 1e-3
    assert (got - want).square().mean() < 0.02 * (want - x).square().mean()
    assert kvdsl.bits(scheme, head_dim=64).formula("keys") == "16/64 x (8 + (16 + 16)/16) = 2.5 bits"


def test_bits_that_fall_with_variance_lose_less_than_equal_ones() -> None:
    x = falling()
    equal = Scheme(both=Store(Uniform(2), scale=per_token(channels=16), transform=(ChannelShift(), Eigenbasis("own"))))
    uneven = Scheme(both=kvtc2.values)
    assert kvdsl.bits(uneven, head_dim=64).mean < kvdsl.bits(equal, head_dim=64).mean

    def lost(scheme: Scheme) -> float:
        got, _ = reference.roundtrip(scheme, x, x, params=kvdsl.calibrate(scheme, x, x))
        return float((got - x).square().mean())

    assert lost(uneven) < 0.5 * lost(equal)


def test_a_basis_is_of_keys_without_their_positions() -> None:
    """Turned keys of one direction alone fill the plane of each pair: without positions one axis keeps all of them."""
    frequencies = 10000.0 ** (-torch.arange(32.0) / 32)
    still = torch.randn(1, 1, 200, 1, generator=torch.Generator().manual_seed(1)) * torch.linspace(-1, 1, 64)
    angles = torch.arange(200.0)[:, None] * frequencies
    a, b = still.chunk(2, -1)
    k = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
    one = KEPT.with_(transform=(Eigenbasis("own", rank=8),))
    scheme = Scheme(keys=one.with_(transform=(PreRope(), *one.transform)), values=one)  # type: ignore[misc]
    given = kvdsl.calibrate(scheme, k, k, params={"keys.transform[0]": frequencies})
    keys, values = reference.roundtrip(scheme, k, k, params=given)
    assert (keys - k).abs().max() < 0.02 < 0.2 < (values - k).abs().max()


def test_quotas_of_a_basis_are_those_of_least_error_and_may_be_none() -> None:
    """The rule finds what trying all allocations of as many bits finds."""
    x = falling()
    found = kvdsl.basis_quotas(x, 2, parts=4, most=6)
    assert list(found) == sorted(found, reverse=True) and 0 in found
    variances = torch.linalg.eigvalsh(torch.stack([head.mT.cov() for head in x[0].double()])).flip(-1)
    parts = variances.unflatten(-1, (4, -1)).mean(-1).log().mean(0).exp()
    choices = [bits for bits in itertools.product(range(7), repeat=4) if sum(bits) == 8]
    best = min(choices, key=lambda bits: sum(float(p) * 4.0**-b for p, b in zip(parts, bits, strict=True)))
    assert [bits for bits, share in found.items() for _ in range(round(4 * share))] == list(best)
    with pytest.raises(ValueError, match="parts: 64 channels are no whole number of 5 parts"):
        kvdsl.basis_quotas(x, 2, parts=5)


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        (
            KEPT.with_(transform=(Eigenbasis("own", rank=0.5), Rotate("hadamard"))),
            r"transform\[0\].rank: Rotate is of whole vectors, of which rank=0.5 keeps a part; put the basis last",
        ),
        (
            Store(Additive(8, stages=4), scale=per_token(), transform=Eigenbasis("own", rank=8)),
            r"transform\[0\].rank: the tables of Additive are of all numbers of a head",
        ),
        (
            Store(kvtc2.keys.code.with_(channels=(32, 64)), transform=Eigenbasis("own", rank=0.75)),
            r"code.channels: 32 and 64 say how long a vector is.*give shares of those that are kept",
        ),
        (
            KEPT.with_(transform=Eigenbasis("own", rank=1.5)),
            r"transform\[0\].rank: 1.5 is no share of channels; use a share below 1",
        ),
    ],
)
def test_numbers_that_cannot_be_left_out_are_refused(store: Store, fault: str) -> None:
    with pytest.raises(SchemeError, match=fault):
        Scheme(both=store)


def test_kept_numbers_that_fill_no_bytes_are_refused_at_a_shape() -> None:
    with pytest.raises(SchemeError, match=r"transform\[2\].rank: 60 numbers of head_dim 80 are no multiple of 8"):
        refuse_for(kvtc2_before_rope, Shape(80, 1))
    with pytest.raises(SchemeError, match=r"transform\[1\].rank: 96 of head_dim 64; leave it out"):
        refuse_for(Scheme(both=KEPT.with_(transform=(ChannelShift(), Eigenbasis("own", rank=96)))), Shape(64, 1))
    with pytest.raises(SchemeError, match="stretches of channels have none behind PreRope; leave it out, or put a map"):
        Scheme(keys=Store(kvtc2.keys.code, transform=PreRope()), values=Store())
    third = Bands(kvtc2.keys.code.stores, channels=(0.25, 0.75))  # type: ignore[union-attr]
    with pytest.raises(SchemeError, match="0.25 of the 48 numbers that are kept are no multiple of 8 channels"):
        refuse_for(Scheme(both=Store(third, transform=Eigenbasis("own", rank=0.75))), Shape(64, 1))
