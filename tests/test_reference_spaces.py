"""The spaces that a side is coded in: maps by hand, what a NaN does, that an exact code is undone, and the laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvdsl import reference
from kvdsl.errors import ShapeError
from kvdsl.matrices import rotation
from kvdsl.scheme import (
    ALL,
    Block,
    ChannelScale,
    ChannelShift,
    Float,
    Permute,
    Rotate,
    Scale,
    Sketch,
    Store,
    Uniform,
    per_channel,
    per_token,
)

EXACT = Float("fp32")
ROOT = ChannelScale("sqrt_absmax")
CHAIN = (ChannelShift(), ChannelScale(), Permute(), Rotate())
GIVEN = {
    "keys.transform[0]": torch.tensor([[1.0, 2]]),
    "keys.transform[1]": torch.tensor([[4.0, 0.5]]),
    "keys.transform[2]": torch.tensor([[1.0, 0]]),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(heads: int, channels: int, side: str = "keys") -> dict[str, torch.Tensor]:
    """Numbers for the chain (shift, scale, permutation)."""
    order = torch.stack([torch.randperm(channels, generator=torch.Generator().manual_seed(h)) for h in range(heads)])
    return {
        f"{side}.transform[0]": normal(heads, channels),
        f"{side}.transform[1]": normal(heads, channels, seed=1).exp(),
        f"{side}.transform[2]": order.float(),
    }


def test_maps_by_hand() -> None:
    """(x - m) / n of x = (a, b) is (a/4 - 1/4, 2b - 4); turned around; then sum and difference over sqrt(2)."""
    found = reference.maps(Store(EXACT, transform=CHAIN), 2, 1, GIVEN)
    assert found is not None
    e, u, w, v = (t[0] * math.sqrt(2) if t is not found[3] else t[0] for t in found)
    assert torch.allclose(e, torch.tensor([[0.25, 2], [-0.25, 2]], dtype=torch.float64), rtol=1e-7, atol=0)
    assert torch.allclose(u, torch.tensor([4.25, 3.75], dtype=torch.float64), rtol=1e-7, atol=0)
    # back: (y0 - y1) * 4 + 1 and (y0 + y1) / 2 + 2
    assert torch.allclose(w, torch.tensor([[4, -4], [0.5, 0.5]], dtype=torch.float64), rtol=1e-7, atol=0)
    assert torch.allclose(v, torch.tensor([1.0, 2], dtype=torch.float64), rtol=1e-7, atol=0)
    assert all(torch.equal(t, t.float().double()) for t in found)
    assert reference.maps(Store(EXACT), 2, 1) is None


def test_rows_by_hand() -> None:
    """x = (5, 3): shifted 4, 1, scaled 1, 2, turned 2, 1, rotated 3 and 1 over sqrt(2)."""
    x = torch.tensor([5.0, 3]).reshape(1, 1, 1, 2)
    y = reference.encoded_rows(Store(EXACT, transform=CHAIN), x, GIVEN)
    assert y.dtype is torch.float32
    assert y.flatten().tolist() == pytest.approx([3 / math.sqrt(2), 1 / math.sqrt(2)], rel=2e-7)
    for i, right in enumerate(([5.0, 3], [4, 1], [1, 2], [2, 1])):
        exact = Store(EXACT, transform=CHAIN[:i])
        assert reference.encoded_rows(exact, x, GIVEN).flatten().tolist() == right
        assert reference.quantize(exact, x, GIVEN).decoded.flatten().tolist() == [5, 3]


def test_codes_live_in_the_mapped_space() -> None:
    """x = (1, 5, 2, 8) in order (3, 0, 2, 1): pairs 8, 1 and 2, 5, one bit each."""
    store = Store(Uniform(1), scale=per_token(2, dtype="fp32"), transform=Permute())
    order = {"keys.transform[0]": torch.tensor([[3.0, 0, 2, 1]])}
    got = reference.quantize(store, torch.tensor([1.0, 5, 2, 8]).reshape(1, 1, 1, 4), order)
    assert got.codes is not None and got.codes.flatten().tolist() == [1, 0, 0, 1]
    assert got.scale is not None and got.scale.flatten().tolist() == [7, 3]
    assert got.coded.flatten().tolist() == [8, 1, 2, 5] and got.decoded.flatten().tolist() == [1, 5, 2, 8]


def test_a_number_is_rounded_once() -> None:
    """1 + 2**-24 + 2**-24 is summed before it is rounded, the shift with it."""
    store = Store(EXACT, transform=Rotate(size=4))
    x = torch.tensor([1.0, 2**-24, 2**-24, 0]).reshape(1, 1, 1, 4)
    assert reference.encoded_rows(store, x).flatten().tolist()[0] == (1 + 2**-23) / 2
    shifted = Store(EXACT, transform=(Rotate(size=4), ChannelShift()))
    given = {"keys.transform[1]": torch.full((1, 4), 0.5)}
    assert reference.encoded_rows(shifted, x, given).flatten().tolist()[0] == 2**-24


def test_rotations_are_hadamards_and_drawn_ones() -> None:
    x = normal(2, 2, 3, 32)
    for rotate in (Rotate(), Rotate("random_hadamard", seed=3), Rotate("orthogonal", size=8, seed=1)):
        size = rotate.size if isinstance(rotate.size, int) else 32
        y = reference.encoded_rows(Store(EXACT, transform=rotate), x)
        right = x.double() @ rotation(rotate.kind, size, rotate.seed, 32).T
        assert torch.allclose(y.double(), right, atol=1e-6)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)


@pytest.mark.parametrize("transform", [CHAIN[:3], CHAIN, (Rotate("orthogonal", size=16, seed=2), *CHAIN[:0])])
def test_p19_an_exact_code_is_undone(transform: Any) -> None:
    x = normal(2, 3, 5, 64)
    got = reference.quantize(Store(EXACT, transform=transform), x, calibrated(3, 64, "values"), "values")
    assert torch.allclose(got.decoded, x.double(), rtol=0, atol=2e-5)
    assert not torch.equal(got.coded, got.decoded)


def test_p19_permuted_channels_are_the_same_numbers() -> None:
    x, params = normal(1, 2, 4, 32), {"keys.transform[0]": calibrated(2, 32)["keys.transform[2]"]}
    got = reference.quantize(Store(Uniform(4), scale=per_token(), transform=Permute()), x, params)
    plain = reference.quantize(Store(Uniform(4), scale=per_token()), x)
    assert torch.equal(got.decoded, plain.decoded)


def test_a_power_of_two_scales_exactly() -> None:
    """P19: k/n coded and times n, with one n for all channels, is the plain code times powers of two."""
    x = normal(1, 2, 4, 32)
    got = reference.quantize(
        Store(Uniform(4), scale=per_token(), transform=ChannelScale()),
        x,
        {"keys.transform[0]": torch.full((2, 32), 4.0)},
    )
    assert torch.equal(got.decoded, reference.quantize(Store(Uniform(4), scale=per_token()), x).decoded)


def test_p19_balanced_keys_meet_the_same_queries() -> None:
    """(q n) (k / n) = q k: what stands on the query's side is the scale that came off the keys, of its kv head."""
    from kvdsl.scheme import Scheme

    k, q = normal(1, 2, 9, 32), normal(1, 4, 3, 32, seed=2)
    n = normal(2, 32, seed=3).exp()
    scheme = Scheme(keys=Store(EXACT, transform=ChannelScale("balance")), values=Store(EXACT))
    exact = (q.double() @ k.double().repeat_interleave(2, 1).mT).float()
    by_hand = (q * n.repeat_interleave(2, 0)[:, None]) @ (k / n[:, None]).repeat_interleave(2, 1).mT
    torch.testing.assert_close(by_hand, exact, rtol=0, atol=1e-4)
    found = reference.scores(scheme, q, k, params={"keys.transform[0]": n}).float()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_p19_channels_that_grow_together_grow_exactly() -> None:
    """Values times a: sqrt(max |v|) grows by sqrt(a), what is coded too, and what is decoded by a; of one channel alone
    its neighbours' codes move as well."""
    import kvdsl

    scheme = kvdsl.Scheme(keys=Store(EXACT), values=Store(Uniform(4), scale=per_token(dtype="fp32"), transform=ROOT))
    x = normal(1, 2, 16, 32)

    def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        params = kvdsl.calibrate(scheme, x, x)
        got = reference.quantize(scheme.values, x, params, "values")
        assert got.codes is not None
        return params["values.transform[0]"], got.codes, got.decoded

    scales, codes, decoded = coded(x)
    larger_scales, same_codes, larger = coded(16 * x)
    assert torch.equal(larger_scales, 4 * scales)
    assert torch.equal(same_codes, codes) and torch.equal(larger, 16 * decoded)
    one = x.clone()
    one[..., 5] *= 16
    one_scales, other_codes, other = coded(one)
    assert torch.equal(one_scales[:, 5], 4 * scales[:, 5]) and torch.equal(one_scales[:, :5], scales[:, :5])
    assert not torch.equal(other_codes[..., :5], codes[..., :5]) and not torch.equal(
        other[..., 5], 16 * decoded[..., 5]
    )


def test_p17_a_rotation_leaves_scores_and_outputs() -> None:
    """Stored exactly, by the definition and through pages: q R^T R k and (p R v) R, to 1e-5 of their sizes."""
    import kvdsl

    k, v, q = normal(1, 2, 70, 64), normal(1, 2, 70, 64, seed=1), normal(1, 4, 3, 64, seed=2)
    plain = kvdsl.Scheme(both=Store(EXACT))
    for rotate in (Rotate(), Rotate(size=16), Rotate("random_hadamard", seed=1), Rotate("orthogonal", seed=2)):
        turned = kvdsl.Scheme(both=Store(EXACT, transform=rotate))
        right, (out, lse) = reference.scores(plain, q, k), reference.attend(plain, q, k, v, window=False)
        found = [(reference.scores(turned, q, k), *reference.attend(turned, q, k, v, window=False))]
        scores = kvdsl.scores(turned, q, k, backend="torch", window=False)
        found.append((scores, *kvdsl.attend(turned, q, k, v, backend="torch", window=False)))
        for got in found:
            for x, y in zip(got, (right, out, lse), strict=True):
                assert (x.double() - y).norm() <= 1e-5 * y.norm()
        assert (reference.encoded_rows(turned.keys, k) - k).norm() > k.norm() / 2


def test_a_nan_spoils_its_vector_and_their_blocks() -> None:
    x = normal(1, 2, 8, 32)
    x[0, 1, 2, 5] = math.nan
    for scale, tokens in ((per_token(8), [2]), (per_channel(4), [0, 1, 2, 3])):
        got = reference.quantize(Store(Uniform(4), scale=scale, transform=Rotate()), x)
        assert got.decoded[0, 1, tokens].isnan().all() and got.decoded.isnan().sum() == 32 * len(tokens)
        assert got.scale is not None and got.scale.isnan().sum() == (4 if len(tokens) == 1 else 32)
    rows = reference.encoded_rows(Store(EXACT, transform=Rotate()), x)
    assert rows[0, 1, 2].isnan().all() and rows.isnan().sum() == 32
    # with a calibrated scale a NaN counts as 0 there
    fixed = Store(Uniform(4), scale=Scale(Block(ALL, ALL, ALL), range="absmax", when="calibrated"), transform=Rotate())
    got = reference.quantize(fixed, x, {"keys.scale": torch.ones(1, 1)})
    assert (got.decoded[0, 1, 2] == 0).all() and got.codes is not None and (got.codes[0, 1, 2] == 7).all()


def test_infinities_saturate_before_the_map() -> None:
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = math.inf
    assert reference.encoded_rows(Store(EXACT, transform=Rotate()), x).flatten().tolist() == [32752.0] * 4


def test_a_papers_own_matrix_stands_for_the_chain() -> None:
    x = normal(1, 2, 4, 16)
    matrix = torch.linalg.qr(normal(2, 16, 16, seed=4)).Q
    params = {"keys.encode": matrix, "keys.decode": matrix.transpose(1, 2)}
    got = reference.quantize(Store(EXACT, transform=Rotate("orthogonal", seed=0)), x, params)
    assert torch.allclose(got.coded, (x @ matrix.transpose(1, 2)).double(), atol=1e-6)
    assert torch.allclose(got.decoded, x.double(), atol=1e-5)
    common = {name: map[:1] for name, map in params.items()}
    assert torch.equal(reference.quantize(Store(EXACT, transform=Rotate()), x, common).coded[:, 0], got.coded[:, 0])


def test_the_maps_stand_for_what_they_are_made_of() -> None:
    """Given as they were found, shifts too, they code alike."""
    x, params = normal(1, 2, 4, 16), calibrated(2, 16)
    store = Store(Uniform(4), scale=per_token(), transform=CHAIN)
    found = reference.maps(store, 16, 2, params)
    assert found is not None
    e, u, w, v = found
    given = {"keys.encode": e, "keys.encode_shift": -u, "keys.decode": w, "keys.decode_shift": v}
    got, right = reference.quantize(store, x, given), reference.quantize(store, x, params)
    assert got.codes is not None and right.codes is not None and torch.equal(got.codes, right.codes)
    assert torch.equal(got.decoded, right.decoded)


def test_params_that_do_not_fit() -> None:
    x = normal(1, 2, 4, 16)
    store = Store(EXACT, transform=(Rotate(), ChannelScale()))
    with pytest.raises(ShapeError, match=r"params\['values.transform\[1\]'\]: missing"):
        reference.quantize(store, x, side="values")
    with pytest.raises(ShapeError, match=r"shape \(16,\); the right one is \(2, 16\)"):
        reference.quantize(store, x, {"keys.transform[1]": torch.ones(16)})
    with pytest.raises(ShapeError, match=r"params\['keys.decode'\]: missing"):
        reference.quantize(store, x, {"keys.encode": torch.ones(1, 16, 16)})
    with pytest.raises(ShapeError, match=r"shape \(1, 16, 16\); the right one is \(2, 32, 16\)"):
        reference.quantize(Store(Sketch(32)), x, {"keys.encode": torch.ones(1, 16, 16)})


def test_attention_reads_the_original_space() -> None:
    """A rotated and shifted side in fp32 is the plain side, to roundings."""
    from kvdsl.scheme import Scheme

    k, v, q = normal(1, 2, 9, 32), normal(1, 2, 9, 32, seed=1), normal(1, 4, 3, 32, seed=2)
    params = {**calibrated(2, 32), **calibrated(2, 32, "values")}
    plain, mapped = Scheme(both=Store(EXACT)), Scheme(both=Store(EXACT, transform=CHAIN))
    for got, right in zip(
        reference.attend(mapped, q, k, v, params=params), reference.attend(plain, q, k, v), strict=True
    ):
        assert torch.allclose(got, right, atol=1e-5)
