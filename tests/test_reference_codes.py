"""The reference's tables, minifloats, sketches, second scales and searches, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvdsl import reference
from kvdsl.errors import ShapeError
from kvdsl.reference.rounding import MINIFLOATS, minifloat_bits, minifloat_values, nearest, to_integer
from kvdsl.scheme import (
    ALL,
    Block,
    Code,
    Codebook,
    Float,
    Scale,
    Sketch,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)

INF, NAN = math.inf, math.nan
TERNARY = Codebook(levels=(-1, 0, 1))
UNEVEN = Codebook(levels=(-2, -0.5, 0.25, 1))


def rows(*numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).reshape(1, 1, len(numbers), -1)


def one_block(code: Code, numbers: list[float], params: Any = None, **scale: Any) -> reference.Quantized:
    """The numbers as one token's block, metadata in fp32 where the caller says nothing."""
    store = Store(code, scale=per_token(**{"dtype": "fp32", **scale}))
    return reference.quantize(store, rows(numbers), params)


def listed(tensor: torch.Tensor | None) -> list[float]:
    assert tensor is not None
    return [float(number) for number in tensor.flatten()]


# (code, scale, block, codes, scale, offset, decoded), every number worked out in the comment above it
BY_HAND: dict[str, tuple[Code, dict[str, Any], list[float], list[int], float, float | None, list[float]]] = {
    # root mean square of 3, 3, -3, -3; y = 1, 1, -1, -1 lies between -0.125 and 0.625 and beyond, below -1.25 is none
    "norm": (UNEVEN, {}, [3, 3, -3, -3], [3, 3, 1, 1], 3, None, [3, 3, -1.5, -1.5]),
    "norm clipped": (UNEVEN, {"clip": 0.5}, [3, 3, -3, -3], [3, 3, 0, 0], 1.5, None, [1.5, 1.5, -3, -3]),
    # mean of 1, 1, 2, 4; borders -1/2 and 1/2 belong to the lower level: 1/2 is 0, -1/2 is -1's neighbour below
    "absmean": (TERNARY, {"range": "absmean"}, [1, -1, 2, -4], [1, 0, 2, 0], 2, None, [0, -2, 2, -2]),
    # 4 / 2
    "absmax": (UNEVEN, {"range": "absmax"}, [4, 1, 0, -3], [3, 2, 2, 0], 2, None, [2, 0.5, 0.5, -4]),
    # the extreme 4 over the lowest level -2: s = -2; y = -2, -0.5, 0, 1.5
    "signed": (UNEVEN, {"range": "signed_absmax"}, [4, 1, 0, -3], [0, 1, 2, 3], -2, None, [4, 1, -0.5, -2]),
    # (8 - 2) / 2 = 3 around 5; y = -1, 1, 0, 1/3
    "minmax": (TERNARY, {"range": "minmax"}, [2, 8, 5, 6], [0, 2, 1, 1], 3, 5, [2, 8, 5, 5]),
    # 0 to 8: 4 around 4; y = -1/2, 1, 1/4, 1/2
    "minmax_zero": (TERNARY, {"range": "minmax_zero"}, [2, 8, 5, 6], [0, 2, 1, 1], 4, 4, [0, 8, 4, 4]),
    "zeros": (TERNARY, {"range": "absmax"}, [0, 0], [1, 1], 0, None, [0, 0]),
    # 12 / 6; y = 6, 2.5 and 1.25 (ties to even: 2, 1), -5 (a tie: -4), -0.75 (-1), 0.25 (0)
    "e2m1": (Float("e2m1"), {}, [12, 5, 2.5, -10, -1.5, 0.5, -0.25],
             [7, 4, 2, 14, 10, 0, 0], 2, None, [12, 4, 2, -8, -2, 0, 0]),
    # s = 896 / 448; 9.5 and 8.5 lie between 9 = 1.001b * 8 and 10, and 8 and 9: ties to even 10 and 8
    "e4m3": (Float("e4m3"), {}, [-896, 19, 17, 1, 0], [0xFE, 0x52, 0x50, 0x30, 0], 2, None, [-896, 20, 16, 1, 0]),
    # a quarter of the range: s = 0.5, and 448 is the largest
    "e4m3 clipped": (Float("e4m3"), {"clip": 0.25}, [896, 1], [0x7E, 0x40], 0.5, None, [224, 1]),
    # s = 57344 / 57344; 1.125 is a tie between 1 and 1.25, 1.375 between 1.25 and 1.5
    "e5m2": (Float("e5m2"), {}, [57344, 1.125, -1.375], [0x7B, 0x3C, 0xBE], 1, None, [57344, 1, -1.5]),
    # y = 0.5, -0.5, 1.5, -2.5 away from 0
    "away": (Uniform(4, rounding="away"), {"range": "absmax"}, [7, 0.5, -0.5, 1.5, -2.5], [14, 8, 6, 9, 4], 1, None,
             [7, 1, -1, 2, -3]),
    # ends have top level 7, cells 8
    "absmax e8m0": (Uniform(4), {"range": "absmax", "dtype": "e8m0"}, [15, 4, -2], [14, 9, 6], 2, None, [14, 4, -2]),
    # floor(log2 15) = 3, floor(log2 6) = 2: s = 2; y = 7.5 saturates
    "mx": (Float("e2m1"), {"dtype": "e8m0"}, [15, 8, -3], [7, 6, 11], 2, None, [12, 8, -3]),
    # exactly a power of two belongs to its own octave
    "mx power": (Float("e2m1"), {"dtype": "e8m0"}, [16, 15.9375], [6, 6], 4, None, [16, 16]),
    # ceil: 2^1 and 2^2 of 12/6 and just more; round: 2^1 to the root of 2 above, 2.8284 here
    "ceil": (Float("e2m1"), {"dtype": "e8m0", "exponent": "ceil"}, [12, 5], [7, 4], 2, None, [12, 4]),
    "ceil above": (Float("e2m1"), {"dtype": "e8m0", "exponent": "ceil"}, [12.015625, 5], [5, 2], 4, None, [12, 4]),
    "round": (Float("e2m1"), {"dtype": "e8m0", "exponent": "round"}, [16.953125], [7], 2, None, [12]),
    "round above": (Float("e2m1"), {"dtype": "e8m0", "exponent": "round"}, [16.984375], [6], 4, None, [16]),
    "float away": (Float("e2m1", rounding="away"), {"dtype": "e8m0"}, [5, 0.25, -2.5], [7, 1, 13], 1,
                   None, [6, 0.5, -3]),
    "float down": (Float("e2m1", rounding="half_down"), {"dtype": "e8m0"}, [5, 3.5, -2.5], [6, 5, 13], 1,
                   None, [4, 3, -3]),
    "mx zero": (Float("e2m1"), {"dtype": "e8m0"}, [0, 0], [0, 0], 2.0**-126, None, [0, 0]),
    # 17 is a tie between 16 and 18; y = -1/2 belongs to the level below
    "e4m3 scale": (TERNARY, {"range": "absmax", "dtype": "e4m3"}, [17, -8, 8.5], [2, 0, 2], 16, None, [16, -16, 16]),
    "e4m3 scale saturates": (TERNARY, {"range": "absmax", "dtype": "e4m3"}, [900, 224], [2, 1], 448, None, [448, 0]),
    # 2^-8 / 6 is less than half of 2^-9, and is raised to 2^-9: y = 2, -1/2; without a floor all would be 0
    "floor": (Float("e2m1"), {"dtype": "e4m3", "floor": 2.0**-9}, [2.0**-8, -(2.0**-10)], [4, 9], 2.0**-9, None,
              [2.0**-8, -(2.0**-10)]),
    "floor one number": (TERNARY, {"dtype": "fp16", "floor": 0.5, "range": "minmax"}, [3, 3], [1, 1], 0.5, 3, [3, 3]),
    # (20 - 1) / 2 = 9.5 and 10.5 both become 10, ties to even
    "e4m3 offset": (TERNARY, {"range": "minmax", "dtype": "e4m3"}, [1, 20, 15], [0, 2, 1], 10, 10, [0, 20, 10]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND.keys())
def test_by_hand(case: tuple[Any, ...]) -> None:
    code, scale, numbers, codes, right_scale, right_offset, decoded = case
    got = one_block(code, numbers, **scale)
    assert listed(got.codes) == codes
    assert listed(got.scale) == [right_scale]
    assert (got.offset is None) == (right_offset is None) and (
        got.offset is None or listed(got.offset) == [right_offset]
    )
    assert listed(got.decoded) == decoded and torch.equal(got.decoded, got.coded)


def test_borders_between_levels_are_float32() -> None:
    """The middle of 1 and 1 + 2**-23 is no float32 number: the even 1 is, and 1 itself is not above it."""
    code = Codebook(levels=(1.0, 1.0 + 2**-23))
    store = Store(code, scale=per_tensor(when="calibrated", range="absmax"))
    got = reference.quantize(store, rows([1.0, 1.0 + 2**-23, 0.0]), {"keys.scale": torch.ones(1, 1)})
    assert listed(got.codes) == [0, 1, 0]


def test_a_sum_is_rounded_once() -> None:
    """1 + 2**-24 + 2**-24 in float32, number after number, is 1; here it is 1 + 2**-23."""
    numbers = [1.0, 2**-24, 2**-24, 0.0]
    got = one_block(TERNARY, numbers, range="absmean")
    assert listed(got.scale) == [(1 + 2**-23) / 4]


# ---- minifloats


def test_e2m1_by_hand() -> None:
    right = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert minifloat_values(MINIFLOATS["e2m1"]).tolist() == right + [-number for number in right]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(name: str, dtype: torch.dtype) -> None:
    kind = MINIFLOATS[name]
    right = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = right.isfinite()
    assert torch.equal(minifloat_values(kind)[finite], right[finite])
    assert minifloat_values(kind)[~finite].isnan().all() and finite.sum() == 254 - 6 * (name == "e5m2")
    x = torch.cat([right[finite], torch.randn(20000, dtype=torch.float64) * 3, torch.randn(20000) * 2**-7]).float()
    middles = right[finite].sort().values.unique()
    x = torch.cat([x, ((middles[1:] + middles[:-1]) / 2).float()])
    assert torch.equal(nearest(x.double(), kind), x.to(dtype).double())
    bits = x.to(dtype).view(torch.uint8).long()
    assert torch.equal(minifloat_bits(nearest(x.double(), kind), kind), torch.where(x.to(dtype) == 0, 0, bits))


def test_a_minifloat_without_a_scale() -> None:
    x = rows([1, 500, -INF, NAN, -1e-9, 0.0625])
    got = reference.quantize(Store(Float("e4m3")), x)
    assert listed(got.codes) == [0x38, 0x7E, 0xFE, 0x7F, 0, 0x18] and got.scale is None
    assert listed(got.decoded)[:3] == [1, 448, -448] and got.decoded[..., 3].isnan()
    got = reference.quantize(Store(Float("e5m2")), x)
    assert listed(got.codes) == [0x3C, 0x60, 0xFB, 0x7E, 0, 0x2C]


def test_a_calibrated_minifloat() -> None:
    store = Store(Float("e4m3"), scale=per_tensor(dtype="fp32", when="calibrated"))
    got = reference.quantize(store, rows([2, 3, 9000]), {"values.scale": torch.full((1, 1), 2.0)}, "values")
    assert listed(got.codes) == [0x38, 0x3C, 0x7E] and listed(got.decoded) == [2, 3, 896]


def test_away() -> None:
    y = torch.tensor([0.5, -0.5, 1.5, -2.5, 2.4999, -0.49999], dtype=torch.float64)
    assert to_integer(y, "away").tolist() == [1, -1, 2, -3, 2, 0]


@pytest.mark.parametrize(
    ("code", "scale"),
    [(Float("e4m3"), {}), (Float("e2m1"), {"dtype": "e8m0"}), (TERNARY, {"dtype": "e4m3"}), (TERNARY, {"clip": (1, 2)}),
     (UNEVEN, {"refit": "least_squares"}), (Codebook(2, "beta"), {"range": "absmax"})],
)  # fmt: skip
def test_a_nan_spoils_its_block_only(code: Code, scale: dict[str, Any]) -> None:
    clean = torch.randn(1, 2, 2, 64, generator=torch.Generator().manual_seed(1))
    clean[0, 1, 0, 40] = 0
    spoiled = clean.clone()
    spoiled[0, 1, 0, 40] = NAN
    store = Store(code, scale=per_token(32, **scale))
    right, got = reference.quantize(store, clean), reference.quantize(store, spoiled)
    nan = got.decoded.isnan()
    assert nan[0, 1, 0, 32:].all() and nan.sum() == 32
    assert torch.equal(got.decoded[~nan], right.decoded[~nan])
    assert got.codes is not None and right.codes is not None and torch.equal(got.codes, right.codes)
    assert got.scale is not None and got.scale.isnan().sum() == 1


# ---- the scale: a search, a second fit, a second level


def test_a_search_takes_the_least_error() -> None:
    # s = 1: 6, 5 -> 4, 4: error 1.  s = 1.5: 6 exact, 5 / 1.5 = 3.33 -> 3: 4.5, error 0.25
    got = one_block(Float("e2m1"), [6, 5], clip=(1.0, 1.5))
    assert listed(got.scale) == [1.5] and listed(got.codes) == [6, 5] and listed(got.decoded) == [6, 4.5]
    # s = 1 is exact, 1.5 as well is never better; of equals the first
    got = one_block(Float("e2m1"), [6, 3], clip=(1.0, 1.5))
    assert listed(got.scale) == [1] and listed(got.codes) == [7, 5]
    got = one_block(Float("e2m1"), [6, 3], clip=(1.5, 1.0))
    assert listed(got.scale) == [1.5] and listed(got.codes) == [6, 4]
    # two blocks choose for themselves
    store = Store(Float("e2m1"), scale=per_token(2, clip=(1.0, 1.5)))
    assert listed(reference.quantize(store, rows([6, 5, 6, 3])).scale) == [1.5, 1]


def test_a_search_over_an_offset() -> None:
    # clip 1/4 goes to 3 in steps of 1: an error of 81; clip 1 to 12 in steps of 4: 1, 2, 2 are 0 (2 / 4 is a tie)
    got = one_block(Uniform(2), [0, 1, 2, 2, 12], clip=(0.25, 1.0))
    assert listed(got.scale) == [4] and listed(got.offset) == [0]
    # 3/4 of 4 is 3 in steps of 1: an error of 1 against more than 1
    got = one_block(Uniform(2), [0, 1, 2, 2, 4], clip=(0.75, 1.0))
    assert listed(got.scale) == [1] and listed(got.codes) == [0, 1, 2, 2, 3]


def test_refit() -> None:
    # 8/9 of the mean 9/4 is 2, levels 0, -1, 1, -1: <x, l> = 2 + 2 + 4 = 8 over 3
    third = float(torch.tensor(8 / 3))
    got = one_block(TERNARY, [1, -2, 2, -4], range="absmean", refit="least_squares", clip=8 / 9)
    assert listed(got.codes) == [1, 0, 2, 0] and listed(got.scale) == [third]
    assert listed(got.decoded) == [0, -third, third, -third]
    # levels 1, -1, 0, 0: <x, x> = 25 over <x, l> = 7
    got = one_block(TERNARY, [3, -4, 0, 0], range="absmean", refit="unit_gain")
    assert listed(got.scale) == [float(torch.tensor(25 / 7))]
    # |x| = 5 over |l| = sqrt(2)
    got = one_block(TERNARY, [3, -4, 0, 0], range="absmean", refit="norm")
    assert listed(got.codes) == [2, 0, 1, 1] and listed(got.scale) == [
        float(torch.tensor(5 / torch.tensor(2.0).sqrt().item()))
    ]
    # nothing but zeros: the first scale stays
    got = one_block(TERNARY, [1, 1, 1, 1], range="absmean", clip=4.0, refit="norm")
    assert listed(got.codes) == [1, 1, 1, 1] and listed(got.scale) == [4]
    # the second fit is rounded to the format as well: 8/3 is 2.75 in three bits
    got = one_block(TERNARY, [1, -2, 2, -4], range="absmean", refit="least_squares", clip=8 / 9, dtype="e4m3")
    assert listed(got.scale) == [2.75]


def test_refit_of_a_uniform_code() -> None:
    # s = 4 / 1 and levels -1, 0, 1: <x, l> = 4 + 3 over 2
    got = one_block(Uniform(2), [4, -3, 1], range="absmax", refit="least_squares")
    assert listed(got.codes) == [2, 0, 1] and listed(got.scale) == [3.5] and listed(got.decoded) == [3.5, -3.5, 0]


def test_weighted_refit_keeps_its_codes() -> None:
    # s = 4: y = 1, 0.625, -0.45 -> 1, 1, 0.  Weighted: (64 + 15.625) / (16 + 6.25) = 3.5787, under which -1.8 would be
    # nearer to -1: the codes stay those that the scale was fitted to
    first = one_block(TERNARY, [4, 2.5, -1.8], range="absmax")
    assert listed(first.codes) == [2, 2, 1]
    got = one_block(TERNARY, [4, 2.5, -1.8], range="absmax", refit="weighted_least_squares")
    scale = float(torch.tensor((64 + 15.625) / (16 + 6.25)))
    assert listed(got.codes) == [2, 2, 1] and listed(got.scale) == [scale]
    assert listed(got.decoded) == [scale, scale, 0]
    plain = one_block(TERNARY, [4, 2.5, -1.8], range="absmax", refit="least_squares")
    assert listed(plain.codes) == [2, 2, 1] and listed(plain.scale) == [3.25]


def test_second_level() -> None:
    # 12 / 6 = 2, over 16 is 1/8, an e4m3 number; 13 / 6 / 16 = 0.1354 is stored as 0.140625 and used as 2.25
    inner = per_tensor(dtype="fp32", when="calibrated")
    store = Store(Float("e2m1"), scale=per_token(2, dtype="e4m3", scale=inner))
    params = {"keys.scale.scale": torch.full((1, 1), 16.0)}
    got = reference.quantize(store, rows([12, 6, 13, 2]), params)
    assert listed(got.scale) == [0.125, 0.140625]
    assert listed(got.codes) == [7, 5, 7, 2] and listed(got.decoded) == [12, 6, 13.5, 2.25]
    with pytest.raises(ShapeError, match=r"params\['keys.scale.scale'\]: missing"):
        reference.quantize(store, rows([12, 6, 13, 2]))
    heads = Store(Float("e2m1"), scale=per_token(2, dtype="e4m3", scale=Scale(Block(ALL, ALL, 1), when="calibrated")))
    x = torch.tensor([[12.0, 6], [12, 6]]).reshape(1, 2, 1, 2)
    got = reference.quantize(heads, x, {"keys.scale.scale": torch.tensor([[2.0], [4.0]])})
    assert listed(got.scale) == [1, 0.5] and listed(got.decoded) == [12, 6, 12, 6]
    # an offset is divided and multiplied as well: 3 around 5, over 2
    offset = Store(TERNARY, scale=per_token(range="minmax", dtype="e4m3", scale=inner))
    got = reference.quantize(offset, rows([2, 8]), {"keys.scale.scale": torch.full((1, 1), 2.0)})
    assert listed(got.scale) == [1.5] and listed(got.offset) == [2.5] and listed(got.decoded) == [2, 8]


def test_a_calibrated_table() -> None:
    store = Store(Codebook(1, "calibrated"), scale=per_channel(when="calibrated"))
    params = {"keys.code": torch.tensor([-0.5, 1]), "keys.scale": torch.tensor([[[2.0, 1]], [[1, 0]]])}
    # channel 0: y = (x - 1) / 2 against the border 0.25; channel 1: y = x
    got = reference.quantize(store, rows([1.5, 0.25], [1.75, 0.5]), params)
    assert listed(got.codes) == [0, 0, 1, 1] and listed(got.decoded) == [0, -0.5, 3, 1]
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: missing"):
        reference.quantize(store, rows([1, 2]), {"keys.scale": params["keys.scale"]})
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: shape \(1,\); the right one is \(2,\)"):
        reference.quantize(store, rows([1, 2]), params | {"keys.code": torch.ones(1)})


def test_levels_that_match() -> None:
    """Codes are of the first row, numbers of the second; the border stays where it was."""
    store = Store(Codebook(1, "calibrated", match="moments"), scale=per_channel(when="calibrated"))
    params = {"keys.code": torch.tensor([[-0.5, 1], [-1, 3]]), "keys.scale": torch.tensor([[[2.0, 1]], [[1, 0]]])}
    got = reference.quantize(store, rows([1.5, 0.25], [1.75, 0.5]), params)
    assert listed(got.codes) == [0, 0, 1, 1] and listed(got.decoded) == [-1, -1, 7, 3]
    with pytest.raises(ShapeError, match=r"params\['keys.code'\]: shape \(2,\); the right one is \(2, 2\)"):
        reference.quantize(store, rows([1, 2]), params | {"keys.code": torch.ones(2)})


# ---- sketches


def test_a_sketch_by_hand() -> None:
    """Rows (1, 1) and (1, -1), x = (3, -1): y = 2, 4, both signs +.  s = sqrt(10 / 2) in fp16, a of two channels."""
    store = Store(Sketch(2, basis="orthogonal"))
    s_matrix = torch.tensor([[1.0, 1], [1, -1]])
    params = {"keys.encode": s_matrix[None], "keys.decode": s_matrix.T[None]}
    got = reference.quantize(store, rows([3, -1], [-1, -3], [2, 2]), params)
    assert listed(got.codes) == [1, 1, 0, 1, 1, 0]  # -1 -3 = -4 and -1 + 3 = 2; 4 and 0, which is -1
    s = torch.tensor([math.sqrt(5), math.sqrt(5), 2]).half().tolist()
    assert listed(got.scale) == s
    # sqrt(2) sqrt(pi/2) / (2 c) with c = 2 / sqrt(pi) is pi / 4
    assert got.coded[0, 0, 0].tolist() == pytest.approx([s[0] * math.pi / 4] * 2, rel=1e-7)
    assert got.decoded[0, 0].tolist() == [
        pytest.approx([s[0] * math.pi / 2, 0], rel=1e-7),
        pytest.approx([0, -s[1] * math.pi / 2], rel=1e-7),
        pytest.approx([0, s[2] * math.pi / 2], rel=1e-7),
    ]


def test_signs_do_not_depend_on_the_norm() -> None:
    """A vector too small for its norm in fp16 still has signs, and reads 0."""
    store, x = Store(Sketch(8, basis="gaussian")), torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    usual, small = (reference.quantize(store, x * size) for size in (1.0, 2.0**-40))
    assert torch.equal(usual.codes, small.codes) and not small.decoded.any()  # type: ignore[arg-type]


def test_a_sketch_of_bad_numbers() -> None:
    store = Store(Sketch(16, basis="gaussian", seed=1))
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1, 3], x[0, 1, 2] = NAN, 0
    got = reference.quantize(store, x)
    assert got.codes is not None and got.scale is not None and got.codes.shape == (1, 2, 3, 16)
    assert got.decoded[0, 0, 1].isnan().all() and got.decoded.isnan().sum() == 8
    assert got.scale[0, 0, 1].isnan() and (got.codes[0, 0, 1] == 0).all()
    assert got.scale[0, 1, 2] == 0 and (got.decoded[0, 1, 2] == 0).all()
    x[0, 0, 1, 3] = INF
    got = reference.quantize(store, x)
    assert not got.decoded.isnan().any() and got.scale is not None
    assert got.scale[0, 0, 1] == torch.tensor(65504 / math.sqrt(8)).half()
