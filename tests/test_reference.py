"""The reference against numbers worked out by hand, and against laws that need no oracle."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdsl.reference
from kvdsl import reference
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.scheme import (
    ALL,
    Block,
    Float,
    Recent,
    Scale,
    Scheme,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)

INF, NAN = math.inf, math.nan


def one_block(code: Uniform, numbers: list[float], **scale: Any) -> reference.Quantized:
    """The numbers as one token's block, metadata in fp32 where the caller says nothing."""
    store = Store(code, scale=per_token(**{"dtype": "fp32", **scale}))
    return reference.quantize(store, torch.tensor(numbers, dtype=torch.float32).reshape(1, 1, 1, -1))


def codes(result: reference.Quantized) -> list[int]:
    assert result.codes is not None
    return [int(c) for c in result.codes.flatten()]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# (code, scale, block, codes, scale, offset, decoded), every number worked out in the comment above it
BY_HAND: dict[str, tuple[Uniform, dict[str, Any], list[float], list[int], float, float | None, list[float]]] = {
    # step (3 - 0) / 3 = 1
    "minmax": (Uniform(2), {}, [0, 1, 2, 3], [0, 1, 2, 3], 1, 0, [0, 1, 2, 3]),
    # step (3 - -6) / 3 = 3, y = 0, 1, 2, 3
    "minmax with a minimum": (Uniform(2), {}, [-6, -3, 0, 3], [0, 1, 2, 3], 3, -6, [-6, -3, 0, 3]),
    # y = 0, 1/2, 3/2, 5/2, 3: ties go to the even neighbour, up, or are no ties at all
    "ties to even": (Uniform(2), {}, [0, 0.5, 1.5, 2.5, 3], [0, 0, 2, 2, 3], 1, 0, [0, 0, 2, 2, 3]),
    "ties up": (Uniform(2, rounding="half_up"), {}, [0, 0.5, 1.5, 2.5, 3], [0, 1, 2, 3, 3], 1, 0, [0, 1, 2, 3, 3]),
    "floor": (Uniform(2, rounding="floor"), {}, [0, 0.5, 1.5, 2.5, 3], [0, 0, 1, 2, 3], 1, 0, [0, 0, 1, 2, 3]),
    # 3 levels in 2 bits: step 4 / 2 = 2, y = 0, 0.5, 1.5, 2
    "three levels": (Uniform(2, levels=3), {}, [0, 1, 3, 4], [0, 0, 2, 2], 2, 0, [0, 0, 4, 4]),
    # step 4 / 4 = 1, y = 0, 1.9, 3, 4: the maximum's cell is the last one; decoded in the middle of the cell
    "cells": (Uniform(2, grid="cells"), {}, [0, 1.9, 3, 4], [0, 1, 3, 3], 1, 0, [0.5, 1.5, 3.5, 3.5]),
    # both ends are halved: hi = 3, step 1; 6 saturates
    "clip": (Uniform(2), {"clip": 0.5}, [0, 2, 6], [0, 2, 3], 1, 0, [0, 2, 3]),
    # the minimum of positive numbers is taken as 0: step 3 / 3; as well the maximum of negative ones
    "minmax_zero": (Uniform(2), {"range": "minmax_zero"}, [1, 2, 3], [1, 2, 3], 1, 0, [1, 2, 3]),
    "minmax_zero below": (Uniform(2), {"range": "minmax_zero"}, [-3, -2], [0, 1], 1, -3, [-3, -2]),
    # z = round(1 / 1)
    "point": (Uniform(2), {"zero": "point"}, [-1, 0, 1, 2], [0, 1, 2, 3], 1, 1, [-1, 0, 1, 2]),
    # z = round(-10 / 1) lies outside 0..3
    "point far away": (Uniform(2), {"zero": "point"}, [10, 11, 12, 13], [0, 1, 2, 3], 1, -10, [10, 11, 12, 13]),
    # z = round(0.5) = 0, codes round(-0.5) = 0, round(2.5) = 2
    "point ties": (Uniform(2), {"zero": "point"}, [-0.5, 2.5], [0, 2], 1, 0, [0, 2]),
    # lo = 0 and hi = 30: step 10, z = 0
    "point zero": (Uniform(2), {"zero": "point", "range": "minmax_zero"}, [10, 30], [1, 3], 10, 0, [10, 30]),
    # step (14 + 1) / 15 = 1 has no low mantissa bits to lose; z = 1
    "in_scale": (Uniform(4), {"zero": "in_scale"}, [-1, 0, 14], [0, 1, 15], 1, 1, [-1, 0, 14]),
    # a range of 15 from 3 on, and one up to -3: codes 0 to 15 are 0 to 15, or -15 to 0
    "held": (Uniform(4), {"zero": "held_in_scale"}, [3, 18, 9], [3, 15, 9], 1, 0, [3, 15, 9]),
    "held below": (Uniform(4), {"zero": "held_in_scale"}, [-18, -3], [0, 12], 1, 15, [-15, -3]),
    # 2 bits have the levels -1, 0, 1: s = 2, x / s = -1, 0.45, 0.5, 1
    "absmax": (Uniform(2), {"range": "absmax"}, [-2, 0.9, 1, 2], [0, 1, 1, 2], 2, None, [-2, 0, 0, 2]),
    # s = 0.5 * 14 / 7 = 1: 15 levels end at 7, 16 levels have one more above
    "absmax clip": (Uniform(4), {"range": "absmax", "clip": 0.5}, [14, -14], [14, 0], 1, None, [7, -7]),
    "absmax 16": (Uniform(4, levels=16), {"range": "absmax", "clip": 0.5}, [14, -14], [15, 0], 1, None, [8, -7]),
    # s = 2 * 2 / 4 = 1, floor(x / s) = -2, -1, 0, 2
    "absmax cells": (Uniform(2, grid="cells"), {"range": "absmax"}, [-2, -1, 0.5, 2], [0, 1, 2, 3], 1, None,
                     [-1.5, -0.5, 0.5, 1.5]),
    # m = -4, s = -4 / -2 = 2, x / s = -2, 0.5, 1.5: codes 0, 2 and 4, which saturates
    "signed": (Uniform(2), {"range": "signed_absmax"}, [-4, 1, 3], [0, 2, 3], 2, None, [-4, 0, 2]),
    # m = 4, s = -2, x / s = -2, 0.5 which goes up to 1
    "signed positive": (Uniform(2, rounding="half_up"), {"range": "signed_absmax"}, [4, -1], [0, 3], -2, None, [4, -2]),
    # of -4 and 4 the positive is the extreme: s = -2, -4 / -2 + 2 = 4 saturates
    "signed tie": (Uniform(2), {"range": "signed_absmax"}, [-4, 4], [3, 0], -2, None, [-2, 4]),
    # 1/3 in 11 bits is 1365 / 4096, in 8 bits 171 / 512; 3 * s is exact
    "fp16": (Uniform(2), {"dtype": "fp16"}, [0, 1], [0, 3], 1365 / 4096, 0, [0, 4095 / 4096]),
    "bf16": (Uniform(2), {"dtype": "bf16"}, [0, 1], [0, 3], 171 / 512, 0, [0, 513 / 512]),
    # 3 * 11184811 * 2**-25 needs 25 bits and rounds up to 1
    "fp32": (Uniform(2), {}, [0, 1], [0, 3], 11184811 * 2.0**-25, 0, [0, 1]),
    # step 4/3 * 2**-24 is stored as 2**-24, the smallest fp16: y = 4 saturates
    "fp16 subnormal": (Uniform(2), {"dtype": "fp16"}, [0, 2**-22], [0, 3], 2**-24, 0, [0, 3 * 2**-24]),
    # step 1/3 * 2**-24 is stored as 0: all codes are 0
    "fp16 underflow": (Uniform(2), {"dtype": "fp16"}, [0, 2**-24], [0, 0], 0, 0, [0, 0]),
    # step 131008 is stored as 65504: y = 2 saturates at code 1
    "fp16 overflow": (Uniform(1), {"dtype": "fp16"}, [-65504, 65504], [0, 1], 65504, -65504, [-65504, 0]),
    # infinities are taken as the largest fp16: step 131008
    "infinities": (Uniform(1), {}, [-INF, INF], [0, 1], 131008, -65504, [-65504, 65504]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND.keys())
def test_by_hand(case: tuple[Any, ...]) -> None:
    code, scale, numbers, right_codes, right_scale, right_offset, decoded = case
    got = one_block(code, numbers, **scale)
    assert codes(got) == right_codes
    assert got.scale is not None and got.scale.item() == right_scale
    assert (got.offset is None) == (right_offset is None) and (got.offset is None or got.offset.item() == right_offset)
    assert got.decoded.flatten().tolist() == decoded


def test_in_scale_rounds_the_scale_to_make_room() -> None:
    # step float32(1.5 / 15) = float32(0.1) = 0x3DCCCCCD, to the nearest multiple of 16: 0x3DCCCCD0 = 13421776 * 2**-27
    got = one_block(Uniform(4), [0, 1.5], zero="in_scale")
    assert got.scale is not None and got.scale.item() == 13421776 * 2.0**-27
    assert codes(got) == [0, 15]


def test_a_stored_zero_has_no_sign() -> None:
    """min(0, -0) may be either: the stored zero is always +0, so that bytes are the same everywhere."""
    for numbers, scale in (([0.0, 3], {"zero": "point"}), ([-0.0, -0.0], {}), ([0.0, 0], {"range": "signed_absmax"})):
        got = one_block(Uniform(2), numbers, **scale)
        for stored in (got.scale, got.offset):
            assert stored is None or not torch.signbit(stored).any()


RANGES: list[tuple[Uniform, dict[str, Any]]] = [
    (Uniform(3), {}),
    (Uniform(3, grid="cells"), {}),
    (Uniform(3), {"zero": "point"}),
    (Uniform(3), {"range": "minmax_zero"}),
    (Uniform(3), {"range": "minmax_zero", "zero": "point"}),
    (Uniform(3), {"zero": "in_scale", "dtype": "fp32"}),
    (Uniform(3), {"range": "absmax"}),
    (Uniform(3, grid="cells"), {"range": "absmax"}),
    (Uniform(3), {"range": "signed_absmax"}),
]


@pytest.mark.parametrize(("code", "scale"), RANGES)
@pytest.mark.parametrize("value", [3.140625, -3.140625, 0.0])
def test_p4_a_constant_block_is_itself(code: Uniform, scale: dict[str, Any], value: float) -> None:
    """P4: exactly, where the range is measured from the numbers; else within one rounding of the scale."""
    for dtype in ("fp16", "bf16", "fp32"):
        got = one_block(code, [value] * 8, **{"dtype": dtype, **scale}).decoded
        if scale.get("range", "minmax") == "minmax" and scale.get("zero") != "in_scale":
            assert (got == value).all()
        elif (code.grid, scale.get("range")) == ("cells", "absmax"):  # the middle of the outermost cell of 8
            assert torch.allclose(got, torch.tensor(value * 7 / 8, dtype=torch.float64), rtol=2**-8, atol=0)
        else:
            assert torch.allclose(got, torch.tensor(value, dtype=torch.float64), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("code", "scale"), RANGES)
def test_a_nan_spoils_its_block_only(code: Uniform, scale: dict[str, Any]) -> None:
    clean = normal(1, 2, 2, 64)
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


def test_every_step_is_float32() -> None:
    """The same steps in float32 tensors, where every operation rounds by itself."""
    x = normal(1, 2, 32, 64) * 5 + 1
    blocks = x.reshape(1, 2, 32, 2, 32)
    low, high = 0.92 * blocks.amin(-1), 0.92 * blocks.amax(-1)
    s, o = ((high - low) / 7).half().float(), low.half().float()
    c = ((blocks - o[..., None]) / s[..., None]).round().clamp(0, 7)
    decoded = s[..., None] * c + o[..., None]
    got = reference.quantize(Store(Uniform(3), scale=per_token(32, clip=0.92)), x)
    assert got.codes is not None and torch.equal(got.codes.reshape_as(c), c.long())
    assert torch.equal(got.decoded.reshape_as(decoded), decoded.double())


def test_blocks_span_what_they_say() -> None:
    x = torch.arange(2 * 4 * 8, dtype=torch.float32).reshape(1, 2, 4, 8)
    cases = ((Block(1, ALL, ALL), (1, 1, 4, 1)), (Block(2, 1, 1), (1, 2, 2, 8)), (Block(4, 4, 2), (1, 1, 1, 2)))
    for block, shape in cases:
        got = reference.quantize(Store(Uniform(2), scale=Scale(block, dtype="fp32")), x)
        assert got.scale is not None and got.scale.shape == shape
    # the last: heads 0 and 1, tokens 0..3, channels 0..3 reach from 0 to 32 + 24 + 3 = 59
    assert got.scale is not None and got.scale.flatten().tolist() == [pytest.approx(59 / 3)] * 2
    assert got.offset is not None and got.offset.flatten().tolist() == [0, 4]


def test_calibrated() -> None:
    x = torch.tensor([[-2.0, -1, 0.5, 9], [0, 1, 2, NAN]]).reshape(1, 2, 1, 4)
    symmetric = Store(Uniform(3), scale=Scale(Block(ALL, 2, 1), range="absmax", when="calibrated"))
    # scales 1, 2 for the halves of head 0; 0.5, 0 of head 1: 7 levels, 3 in the middle; NaN is coded as 0
    got = reference.quantize(symmetric, x, {"keys.scale": torch.tensor([[1, 2], [0.5, 0]])})
    assert codes(got) == [1, 2, 3, 6, 3, 5, 3, 3]
    assert got.decoded.flatten().tolist() == [-2, -1, 0, 6, 0, 1, 0, 0]
    tensor = Store(Uniform(2), scale=per_tensor(when="calibrated"))
    got = reference.quantize(tensor, x, {"values.scale": torch.tensor([1.0, -1]).reshape(2, 1, 1)}, "values")
    assert codes(got) == [0, 0, 2, 3, 1, 2, 3, 1]  # 0.5 - -1 = 1.5 goes to 2
    with pytest.raises(ShapeError, match=r"params\['keys.scale'\]: missing"):
        reference.quantize(tensor, x)
    with pytest.raises(ShapeError, match=r"params\['keys.scale'\]: shape \(2,\); the right one is \(2, 1, 1\)"):
        reference.quantize(tensor, x, {"keys.scale": torch.ones(2)})


def test_float() -> None:
    x = torch.tensor([1 / 3, 1e6, -INF, 2**-26]).reshape(1, 1, 1, 4)
    assert reference.quantize(Store(Float("fp16")), x).decoded.flatten().tolist() == [1365 / 4096, 65504, -65504, 0]
    assert torch.equal(reference.quantize(Store(Float("fp32")), x).decoded, x.double())
    assert reference.quantize(Store(Float("fp16")), x * NAN).decoded.isnan().all()


# ---- laws


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_p1_error_of_minmax(bits: int, dtype: Any) -> None:
    """P1: |x - x^| <= s/2 + |s~ - s| (L - 1) + |m~ - m|, and float32 roundings of numbers up to the largest."""
    x = normal(1, 2, 16, 64, seed=bits) * 3 + 1
    got = reference.quantize(Store(Uniform(bits), scale=per_token(32, dtype=dtype)), x)
    blocks = x.double().reshape(1, 2, 16, 2, 32)
    low, high, top = blocks.amin(-1), blocks.amax(-1), 2**bits - 1
    step = (high - low) / top
    assert got.scale is not None and got.offset is not None
    bound = step / 2 + (got.scale - step).abs() * top + (got.offset - low).abs() + 8 * 2**-23 * blocks.abs().amax(-1)
    assert ((x - got.decoded).abs().reshape_as(blocks) <= bound[..., None]).all()


def test_p2_error_of_the_other_ranges() -> None:
    """P2: half a step for cells and for absmax; one step for signed_absmax, where the far end saturates."""
    x, slack = normal(1, 2, 16, 64) * 3, 1e-5
    cases: list[tuple[Uniform, dict[str, Any], float]] = [
        (Uniform(4, grid="cells"), {"range": "minmax"}, 0.5),
        (Uniform(8), {"range": "absmax"}, 0.5),
        (Uniform(4, grid="cells"), {"range": "absmax"}, 0.5),
        (Uniform(4, rounding="half_up"), {"range": "signed_absmax"}, 1),
    ]
    for code, scale, factor in cases:
        got = reference.quantize(Store(code, scale=per_token(32, dtype="fp32", **scale)), x)
        assert got.scale is not None
        error = (x - got.decoded).abs().reshape(1, 2, 16, 2, 32)
        assert (error <= got.scale.abs()[..., None] * factor + slack).all()
        if factor == 1:
            steps = x.reshape(1, 2, 16, 2, 32) / got.scale[..., None]
            assert (error[steps < 7.5] <= (got.scale.abs()[..., None] / 2 + slack).expand_as(error)[steps < 7.5]).all()


@pytest.mark.parametrize(("code", "scale"), [case for case in RANGES if case[0].grid == "ends"])
def test_p3_a_second_time_changes_no_code(code: Uniform, scale: dict[str, Any]) -> None:
    """P3: ranges that keep their extremes give the same codes for what they decoded."""
    store = Store(code, scale=per_token(32, **{"dtype": "fp32", **scale}))
    once = reference.quantize(store, normal(1, 2, 16, 64))
    twice = reference.quantize(store, once.decoded.float())
    assert once.codes is not None and twice.codes is not None
    if scale.get("zero") in ("point", "in_scale"):  # the extremes move to the integer grid, and the range with them
        assert (once.decoded - twice.decoded).abs().max() <= 1e-5
    else:
        assert torch.equal(once.codes, twice.codes)


def test_p14_a_point_is_an_integer_that_stands_for_zero() -> None:
    """P14: x^ = (c - z) s with z an integer, so a number 0 inside the range stays 0."""
    x = normal(1, 2, 16, 64)
    x[..., ::8] = 0
    for scale in ({"zero": "point", "dtype": "fp32"}, {"zero": "in_scale", "dtype": "fp32"}, {"zero": "point"}):
        got = reference.quantize(Store(Uniform(4), scale=per_token(32, **scale)), x)  # type: ignore[arg-type]
        assert got.offset is not None and got.scale is not None and got.codes is not None
        assert torch.equal(got.offset, got.offset.round())
        assert (got.decoded[x == 0] == 0).all()
        spread = [t.repeat_interleave(32, 3) for t in (got.scale, got.offset)]
        assert torch.equal(got.decoded, (spread[0] * (got.codes - spread[1])).float().double())


def test_p34_a_block_of_one_number_is_lossless_and_refused() -> None:
    """P34: it codes nothing, its minimum is the number itself; a scheme that says so is a mistake."""
    x = normal(1, 1, 4, 8).half()
    single = Store(Uniform(2), scale=Scale(Block(1, 1, 1)))
    assert torch.equal(reference.quantize(single, x).decoded, x.double())
    with pytest.raises(SchemeError, match="scale.block"):
        Scheme(both=single)


# Mean squared error on N(0, 1), of the size of the sample's variance; None: 2**bits levels
TABLE: list[tuple[int, int | None, str, float, dict[int, float]]] = [
    (2, None, "minmax", 1.0, {16: 0.10695, 32: 0.15456, 64: 0.20268, 128: 0.25032}),
    (3, None, "minmax", 1.0, {16: 0.01946, 32: 0.02815, 64: 0.03694, 128: 0.04565}),
    (4, None, "minmax", 1.0, {16: 0.00423, 32: 0.00612, 64: 0.00804, 128: 0.00994}),
    (8, None, "minmax", 1.0, {32: 10**-4.674}),
    (2, None, "minmax", 0.8, {128: 0.16195}),
    (2, None, "minmax", 0.9, {128: 0.20191}),
    (2, None, "minmax", 0.92, {128: 0.21096, 64: 0.17080, 32: 0.13044}),
    (8, None, "absmax", 1.0, {32: 10**-4.544, 128: 10**-4.379}),
    (4, None, "absmax", 1.0, {32: 0.00941, 128: 0.01374}),
    (3, None, "absmax", 1.0, {32: 0.05134}),
    (2, None, "absmax", 1.0, {32: 0.43291, 64: 0.515, 128: 0.588}),
    (2, 3, "minmax", 1.0, {32: 0.345, 64: 0.442, 128: 0.529}),
    (4, None, "signed_absmax", 1.0, {32: 0.00739}),
]


@pytest.mark.parametrize(("bits", "levels", "kind", "clip", "right"), TABLE)
def test_mean_squared_error(bits: int, levels: int | None, kind: Any, clip: float, right: dict[int, float]) -> None:
    x = normal(1, 1, 4096, 128, seed=7)
    rounding: Any = "half_up" if kind == "signed_absmax" else "even"
    for group, error in right.items():
        store = Store(Uniform(bits, levels=levels, rounding=rounding), scale=per_token(group, range=kind, clip=clip))
        got = (reference.quantize(store, x).decoded - x).square().mean().item()
        assert got == pytest.approx(error, rel=0.02)


def test_batch_rows_do_not_meet() -> None:
    k, v = normal(3, 2, 64, 32), normal(3, 2, 64, 32, seed=1)
    scheme = Scheme(keys=Store(Uniform(2), scale=per_channel(32)), values=Store(Uniform(4), scale=per_token(heads=ALL)),
                    recent=Recent(32))  # fmt: skip
    together = reference.roundtrip(scheme, k, v)
    for b in range(3):
        alone = reference.roundtrip(scheme, k[b : b + 1], v[b : b + 1])
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))


def test_the_reference_knows_nothing_of_the_compiler() -> None:
    """Who checks generated code must not share its algebra, its layout or its window."""
    shared = ("scheme", "codes", "tiers", "transforms", "errors", "shape", "levels", "matrices", "probes", "rope")
    language = {f"kvdsl.{name}" for name in shared}
    allowed = language | {"torch", "numpy", "numpy.typing"}
    standard = {"__future__", "collections.abc", "dataclasses", "math", "typing"}
    folder = Path(kvdsl.reference.__file__).parent
    local = {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed | standard, path
            if isinstance(node, ast.ImportFrom):
                assert node.module in (local if node.level else allowed | standard), path
