"""The reference against the formats' own packages: torch's casts, torchao's MX and NVFP4, llama.cpp's blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from published import SIDES, agree, published, same_codes
from torch import Tensor

from kvdsl import reference
from kvdsl.reference.rounding import MINIFLOATS, minifloat_bits
from kvdsl.scheme import ALL, Block, Code, Float, Scale, Store, Uniform, per_tensor, per_token


def nibbles(packed: Tensor) -> Tensor:
    """Two codes a byte, the even channel in the low nibble."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def unsigned(codes: Tensor, negative_zero: int) -> Tensor:
    """Their zeros may have a sign, ours have none."""
    return torch.where(codes == negative_zero, 0, codes.long())


def powers(scale: Tensor | None) -> Tensor:
    assert scale is not None
    return (torch.log2(scale) + 127).to(torch.uint8)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_a_cast(format: Any) -> None:
    name = f"formats/fp8_{format}_scale1"  # formats/fp8_e4m3_scale1, formats/fp8_e5m2_scale1
    for side, _, x in SIDES:
        got = reference.quantize(Store(Float(format)), x)
        same_codes(name, got.codes, unsigned(published(name)[f"{side}_codes"], 128))


def test_fp8_with_a_scale() -> None:
    name = "formats/fp8_e4m3_token"
    for side, _, x in SIDES:
        got = reference.quantize(Store(Float("e4m3"), scale=per_token(dtype="fp32")), x)
        same_codes(name, got.codes, unsigned(published(name)[f"{side}_codes"], 128))
        assert got.scale is not None and torch.equal(got.scale[..., 0], published(name)[f"{side}_scale"].double())


@pytest.mark.parametrize(("name", "format"), [("formats/mxfp4_floor", "e2m1"), ("formats/mxfp8_e4m3_floor", "e4m3")])
def test_mx(name: str, format: Any) -> None:
    """All bytes equal.  Of the two other rules for the power, which are no part of OCP's text, none is followed."""
    for side, _, x in SIDES:
        got, arrays = reference.quantize(Store(Float(format), scale=per_token(32, dtype="e8m0")), x), published(name)
        codes = arrays[f"{side}_codes"]
        same_codes(name, got.codes, unsigned(nibbles(codes), 8) if format == "e2m1" else unsigned(codes, 128))
        assert torch.equal(powers(got.scale), arrays[f"{side}_scale_e8m0"])


@pytest.mark.parametrize("name", ["formats/nvfp4_one_level", "formats/nvfp4_two_level"])
def test_nvfp4(name: str) -> None:
    """Scales equal.  They multiply by the scale's reciprocal, which is rounded: ties may go the other way."""
    arrays = published(name)
    inner = per_tensor(dtype="fp32", when="calibrated") if "two" in name else None
    for side, words, x in SIDES:
        params = {f"{words}.scale.scale": arrays[f"{side}_tensor_scale"].reshape(1, 1)} if inner else {}
        got = reference.quantize(Store(Float("e2m1"), scale=per_token(16, dtype="e4m3", scale=inner)), x, params, words)
        assert got.scale is not None
        assert torch.equal(minifloat_bits(got.scale, MINIFLOATS["e4m3"]), arrays[f"{side}_scale_e4m3"].long())
        same_codes(name, got.codes, unsigned(nibbles(arrays[f"{side}_codes"]), 8))
        agree(name, got.decoded, arrays[f"{side}_hat"])


# ---- llama.cpp's blocks of 32: the scale (and minimum) in fp16, then codes; i and i + 16 share a byte


def halves(packed: Any, at: int) -> Any:
    return packed[:, at : at + 2].copy().view(np.float16)[:, 0]


def pairs(packed: Any) -> Any:
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.int64)


def blocks(name: str, side: str, size: int) -> Any:
    return published(name)[f"{side}_packed"].numpy().reshape(-1, size)


BLOCKS: dict[str, tuple[Code, dict[str, Any], int]] = {
    "gguf/q8_0": (Uniform(8, rounding="away"), {"range": "absmax"}, 34),
    "gguf/q4_0": (Uniform(4, rounding="half_up"), {"range": "signed_absmax"}, 18),
    "gguf/q5_0": (Uniform(5, rounding="half_up"), {"range": "signed_absmax"}, 22),
    "gguf/q4_1": (Uniform(4, rounding="half_up"), {}, 20),
}


def unpacked(name: str, packed: Any) -> Any:
    if "8" in name:
        return packed[:, 2:].view(np.int8).astype(np.int64) + 127
    if "5" in name:
        fifth = packed[:, 2:6].copy().view("<u4") >> np.arange(32, dtype=np.uint32) & 1
        return pairs(packed[:, 6:]) | fifth.astype(np.int64) << 4
    return pairs(packed[:, 4 if "q4_1" in name else 2 :])


@pytest.mark.parametrize("name", BLOCKS)
def test_llama_cpp(name: str) -> None:
    """Scales equal to the bit, and codes where they are taken before the scale is rounded, as llama.cpp does.

    q8_0 and q4_1 multiply by a rounded reciprocal: a tie may go the other way.  This language takes codes under the
    scale that is stored, so that decoding is the best it can be; under fp16 then one code in 100 may move by one.
    """
    code, scale, size = BLOCKS[name]
    for side, _, x in SIDES:
        packed = blocks(name, side, size)
        right = torch.from_numpy(unpacked(name, packed)).reshape(x.shape)
        got = reference.quantize(Store(code, scale=per_token(32, dtype="fp32", **scale)), x)
        same_codes(name, got.codes, right)
        stored = reference.quantize(Store(code, scale=per_token(32, **scale)), x)
        assert stored.scale is not None and stored.codes is not None
        assert (stored.scale.flatten().numpy() == halves(packed, 0)).all()
        assert stored.offset is None or (stored.offset.flatten().numpy() == halves(packed, 2)).all()
        moved = (stored.codes - right).abs()
        assert moved.max() <= 1 and (moved > 0).double().mean() <= (0 if "q4_0" in name or "q5_0" in name else 0.01)


def test_llama_cpp_mxfp4() -> None:
    """Powers equal; at a tie the first of its table is taken, the smaller one, here the even one."""
    name = "gguf/mxfp4"
    for side, _, x in SIDES:
        got, packed = (
            reference.quantize(Store(Float("e2m1"), scale=per_token(32, dtype="e8m0")), x),
            blocks(name, side, 17),
        )
        assert (powers(got.scale).flatten().numpy() == packed[:, 0]).all()
        right = unsigned(torch.from_numpy(pairs(packed[:, 1:])), 8).reshape(x.shape)
        same_codes(name, got.codes, right)
        assert got.scale is not None and got.codes is not None
        flipped = (got.codes != right).reshape(-1, 32)
        y = (x.reshape(-1, 32).double() / got.scale.reshape(-1, 1))[flipped]
        assert set(y.abs().tolist()) <= {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5}


def test_llama_cpp_nvfp4() -> None:
    """Sixteen numbers under e4m3 alone; of ties of the scale theirs takes the larger, of the code the smaller."""
    name = "gguf/nvfp4_c"
    for side, _, x in SIDES:
        got = reference.quantize(Store(Float("e2m1"), scale=per_token(16, dtype="e4m3")), x)
        assert got.scale is not None
        packed = published(name)[f"{side}_packed"]
        scales = minifloat_bits(got.scale, MINIFLOATS["e4m3"]).reshape(-1, 4) - packed[:, :4].long()
        assert set(scales.unique().tolist()) <= {0, -1} and (scales != 0).double().mean() <= 0.01
        codes = packed[:, 4:].reshape(-1, 4, 8)
        right = unsigned(torch.cat([codes & 15, codes >> 4], -1), 8).reshape(x.shape)
        assert got.codes is not None
        same_codes(name, in_order(got.codes), in_order(right))


def in_order(codes: Tensor) -> Tensor:
    """Codes of e2m1 as integers -7..7, so that neighbouring numbers are one apart."""
    return torch.where(codes >= 8, 8 - codes, codes)


@pytest.mark.parametrize("name", ["gguf/tq1_0", "gguf/tq2_0"])
def test_llama_cpp_ternary(name: str) -> None:
    """-1, 0, 1 times the largest of 256 numbers, four tokens here; five digits in a byte or four codes."""
    for side, _, x in SIDES:
        packed = published(name)[f"{side}_packed"].numpy()
        code = Uniform(2, levels=3, rounding="away")
        got = reference.quantize(Store(code, scale=Scale(Block(4, ALL, 1), range="absmax", dtype="fp32")), x)
        assert got.scale is not None
        assert (got.scale.flatten().half().numpy() == halves(packed, packed.shape[1] - 2)).all()
        right = digits(packed) if "tq1" in name else fours(packed)
        same_codes(name, got.codes, torch.from_numpy(right).reshape(x.shape))


def fours(packed: Any) -> Any:
    """64 bytes: in each half number i of every 32 stands at bits 2i of byte i mod 32."""
    bits = packed[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    return bits.reshape(-1, 256).astype(np.int64)


def digits(packed: Any) -> Any:
    """48 bytes of five digits (32 and 16 at a time) and 4 bytes of four, each byte ceil(256 * value / 243)."""
    found = []
    for first, count, five in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        part = packed[:, first : first + count].astype(np.int64)
        for power in range(five):
            found.append(((part * 3**power & 255) * 3) >> 8)
    return np.concatenate(found, 1)
