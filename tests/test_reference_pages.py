"""The packed bytes of the reference: single numbers whose place was worked out by hand, and a place for every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvdsl import reference
from kvdsl.errors import ShapeError
from kvdsl.scheme import (
    ALL,
    Block,
    Codebook,
    Float,
    Recent,
    Rotate,
    Scale,
    Scheme,
    Sketch,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.shape import Shape

ABSENT = Store(Float("fp16"))


def written(bits: int, numbers: torch.Tensor) -> Any:
    """One page of key codes equal to `numbers` (T, D): a calibrated scale of 1 and offset of 0 stores no metadata."""
    scale = Scale(Block(ALL, ALL, ALL), when="calibrated")
    scheme = Scheme(keys=Store(Uniform(bits), scale=scale), values=ABSENT)
    one = torch.tensor([1.0, 0]).reshape(2, 1, 1)
    x = numbers[None, None].float()
    page = reference.pages(scheme, Shape(x.shape[3], 1), x, torch.zeros_like(x), {"keys.scale": one})
    assert page.shape[:2] == (1, 1)
    return page[0, 0]


def test_eight_bits_by_hand() -> None:
    # 64 codes of 8 bits are 32 words a token: channel x in the low byte of word x, channel 32 + x in its high byte
    page = written(8, torch.arange(128).reshape(2, 64))
    assert page[:4].tolist() == [0, 32, 1, 33] and page[62:64].tolist() == [31, 63]
    assert page[64:68].tolist() == [64, 96, 65, 97] and page[128 : 64 * 64].max() == 0


def test_two_bits_by_hand() -> None:
    # 64 codes of 2 bits are 8 words a token, so that a row is 16 words for tokens t and t + 32.  Channel x of plane
    # j = 0..3 has bits 2j and 2j + 1 of its byte: codes 0, 1, 2, 3 in channels 0, 16, 32, 48 are 0b11100100
    codes = (torch.arange(64) // 16).repeat(64, 1)
    codes[32:] = 3 - codes[32:]
    page = written(2, codes)
    assert (page[:1024:2] == 0b11100100).all() and (page[1:1024:2] == 0b00011011).all()


def test_three_bits_by_hand() -> None:
    # one code 0b101 at token 33, channel 17 = 16 * 1 + 1 of 128; planes have 16 channels.
    # top stream: 16 words a token, 8 planes a word, plane 1 at bit 2 of the low byte: byte 33 * 32 + 2 * 1, 0b10 << 2
    # low stream, after 64 * 32 bytes: rows of 16 words for two tokens, token 33 is the upper half of row 1, plane 1 is
    # bit 1: byte 2048 + 1 * 32 + 2 * 1 + 1
    codes = torch.zeros(64, 128)
    codes[33, 17] = 0b101
    page = written(3, codes)
    assert {int(i): int(page[i]) for i in page.nonzero()[0]} == {33 * 32 + 2: 0b1000, 2083: 0b10}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_p27_every_code_bit_has_its_own_place(bits: int, head_dim: int) -> None:
    """P27: all ones fill every stored bit; there are as many stored bits as code bits, so no two share one."""
    for keys in (per_token(), per_token(16), per_token(head_dim // 2)):
        scheme = Scheme(keys=Store(Uniform(bits), scale=keys), values=ABSENT)
        x = torch.ones(1, 1, 64, head_dim)
        x[..., ::16] = 0  # every block has a minimum, whose codes are 0
        page = reference.pages(scheme, Shape(head_dim, 1), x, torch.zeros_like(x))[0, 0]
        ones = int(np.unpackbits(page[: 8 * head_dim * bits]).sum())
        assert ones == int(x.sum()) * bits


def test_metadata_by_hand() -> None:
    k = torch.zeros(1, 2, 128, 64)
    # keys, block 1 of 4 of head 1, channel 5: 1 .. 4 -> step 1, minimum 1.  values, token 70, second half: 2 .. 8
    k[0, 1, 32:64, 5] = torch.linspace(1, 4, 32)
    v = torch.zeros(1, 2, 128, 64)
    v[0, 1, 70, 32:] = torch.linspace(2, 8, 32)
    scheme = Scheme(
        keys=Store(Uniform(2), scale=per_channel(32)), values=Store(Uniform(2), scale=per_token(32)), recent=Recent(32)
    )
    # a blob: 128 tokens * 64 codes * 2 bits = 2048 bytes twice, 4 * 64 and 2 * 128 words of 4 bytes
    assert reference.page_tokens(scheme) == 128 and reference.page_bytes(scheme, Shape(64, 2)) == 2 * (4096 + 2 * 1024)
    (page,) = reference.pages(scheme, Shape(64, 2), k, v)[0].view("<u4")
    blob = 6144 // 4
    assert page[blob + 1024 + 64 + 5] == 0x3C003C00  # [block 1 of 4, channel 5] of head 1: fp16 1.0 and 1.0
    assert page[blob + 1024 + 256 + 128 + 70] == 0x40004000  # [group 1, token 70]: fp16 2.0 and 2.0
    assert np.count_nonzero(page[[*range(1024, 1536), *range(blob + 1024, blob + 1536)]]) == 2


def test_shared_and_wide_metadata_by_hand() -> None:
    k = torch.zeros(1, 4, 64, 32)
    k[0, 2:, 9] = torch.linspace(1, 16, 64).reshape(2, 32)
    keys = Store(Uniform(4), scale=per_token(heads=2, dtype="fp32"))
    values = Store(Uniform(4), scale=per_token(heads=ALL, range="absmax"))
    scheme = Scheme(keys=keys, values=values)
    # blobs of 64 * 32 * (4 + 4) / 8 bytes, scales [2, 64] and offsets [2, 64] of 4 bytes, 64 scales of 2 bytes
    blob, total = 2048, 4 * 2048 + 1024 + 128
    assert reference.page_bytes(scheme, Shape(32, 4)) == total
    page = reference.pages(scheme, Shape(32, 4), k, k)[0, 0]
    tail = page[4 * blob : 4 * blob + 1024].view("<f4")
    assert tail[64 + 9] == 1 and tail[128 + 64 + 9] == 1 and np.count_nonzero(tail) == 2
    shared = page[4 * blob + 1024 :].view("<f2")
    assert shared[9] == np.float16(16 / 7) and np.count_nonzero(shared) == 1


def test_zero_points_and_nan_by_hand() -> None:
    x = torch.zeros(1, 1, 64, 32)
    x[0, 0, 0, :2] = torch.tensor([-1.0, 14])  # step 1, zero point 1
    x[0, 0, 1, :3] = torch.tensor([-1.0, 14, float("nan")])
    words = {"point": (0x3C003C00, 0x3C007E00), "in_scale": (0x3F800001, 0x7FC00001)}
    for zero, right in words.items():
        scale = per_token(zero=zero, dtype="fp32" if zero == "in_scale" else "fp16")
        scheme = Scheme(keys=Store(Uniform(4), scale=scale), values=ABSENT)
        page = reference.pages(scheme, Shape(32, 1), x, x)[0, 0]
        assert tuple(page[64 * 16 + 64 * 64 :].view("<u4")[:2]) == right
    assert page[64 * 16 :].view("<f2")[1] == 14 and page[64 * 16 :].view("<u2")[32 + 2] == 0x7E00


def test_a_page_holds_whole_blocks_of_both_sides() -> None:
    keys, values = Store(Uniform(2), scale=per_channel(96)), Store(Uniform(2), scale=per_channel(128))
    scheme = Scheme(keys=keys, values=values, recent=Recent(384))
    assert reference.page_tokens(scheme) == 384
    with pytest.raises(
        ShapeError, match=r"keys: shape \(1, 1, 128, 32\) has 128 tokens, no whole number of blocks of 96"
    ):
        reference.pages(scheme, Shape(32, 1), torch.zeros(1, 1, 128, 32), torch.zeros(1, 1, 128, 32))
    with pytest.raises(ShapeError, match=r"v: shape \(1, 2, 384, 32\); the right one is \(1, 1, 384, 32\)"):
        reference.pages(scheme, Shape(32, 1), torch.zeros(1, 1, 384, 32), torch.zeros(1, 2, 384, 32))


# ---- minifloats, tables, sketches, scales of one byte


def test_eight_bit_floats_by_hand() -> None:
    # two planes of 32 channels: 1.0 is 0x38 in channel 0, -448 is 0xFE in channel 32, NaN is 0x7F in channel 1
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 0, 0], x[0, 0, 0, 32], x[0, 0, 0, 1] = 1, -1000, float("nan")
    page = reference.pages(Scheme(both=Store(Float("e4m3"))), Shape(64, 1), x, x)[0, 0]
    assert page[:4].tolist() == [0x38, 0xFE, 0x7F, 0] and page[4:4096].max() == 0
    assert page[4096:4100].tolist() == [0x38, 0xFE, 0x7F, 0] and len(page) == 2 * 4096


def test_four_bit_floats_and_powers_of_two_by_hand() -> None:
    # 64 codes of 4 bits: rows of 16 words, planes of 16 channels in the nibbles.  The largest is 12: 2^(3 - 2) = 2
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 2, 0], x[0, 0, 2, 16], x[0, 0, 2, 32], x[0, 0, 2, 63] = 12, -3, 1, 96
    x[0, 0, 3, 0] = float("nan")
    store = Store(Float("e2m1"), scale=per_token(32, dtype="e8m0"))
    page = reference.pages(Scheme(keys=store, values=ABSENT), Shape(64, 1), x, torch.zeros_like(x))[0, 0]
    # of the second half 96 is 6 * 2^4 (byte 131), 1 is 1/16 of that and becomes 0; planes 0 and 1 have the low byte
    assert page[2 * 32 : 2 * 32 + 2].tolist() == [7 | (8 + 3) << 4, 0] and page[2 * 32 + 2 * 15 + 1] == 7 << 4
    # metadata after 64 * 32 bytes of codes and 64 * 128 of values, [group, token]: a block of zeros has the smallest
    # power, byte 1, one with a NaN 255
    meta = page[2048 + 8192 :].tolist()
    assert meta[2] == 128 and meta[64 + 2] == 131 and meta[3] == 255
    assert len(meta) == 128 and all(byte == 1 for at, byte in enumerate(meta) if at not in (2, 3, 66))
    assert reference.page_bytes(Scheme(both=store), Shape(64, 1)) == 2 * (2048 + 128)


def test_a_scale_of_one_byte_by_hand() -> None:
    x = torch.zeros(1, 1, 64, 32)
    x[0, 0, 5] = 12  # 12 / 6 = 2 is 0x40 in e4m3
    inner = per_tensor(dtype="fp32", when="calibrated")
    store = Store(Float("e2m1"), scale=per_token(dtype="e4m3", scale=inner))
    params = {f"{side}.scale.scale": torch.ones(1, 1) for side in ("keys", "values")}
    page = reference.pages(Scheme(both=store), Shape(32, 1), x, x * float("nan"), params)[0, 0]
    assert len(page) == 2 * (1024 + 64)
    assert page[2048 + 5] == 0x40 and np.count_nonzero(page[2048 : 2048 + 64]) == 1
    assert (page[2048 + 64 :] == 0x7F).all()


def test_a_scale_and_an_offset_of_one_byte_by_hand() -> None:
    # token 1: 2 to 8, middle 5 (0x4A) and half width 3 (0x44); scale low, offset high
    x = torch.zeros(1, 1, 64, 32)
    x[0, 0, 1] = torch.linspace(2, 8, 32)
    store = Store(Codebook(levels=(-1, 0, 1), bits=2), scale=per_token(range="minmax", dtype="e4m3"))
    page = reference.pages(Scheme(keys=store, values=ABSENT), Shape(32, 1), x, torch.zeros_like(x))[0, 0]
    first = 64 * 8 + 64 * 64  # after keys of 2 bits and values of 2 bytes
    words = page[first : first + 128].view("<u2")
    assert words[1] == 0x4A44 and np.count_nonzero(words) == 1


def test_three_levels_of_two_bits_by_hand() -> None:
    # 32 codes of 2 bits are 4 words a token; two tokens share a row.  planes of 8 channels, code 2 in channel 9 = 8 + 1
    x = torch.zeros(1, 1, 64, 32)
    x[0, 0, :, :8], x[0, 0, 33, 9] = -1, 1
    store = Store(Codebook(2, levels=(-1, 0, 1)), scale=per_token(range="absmax"))
    page = reference.pages(Scheme(keys=store, values=ABSENT), Shape(32, 1), x, torch.zeros_like(x))[0, 0]
    # row 1 (tokens 1 and 33) is 16 bytes, 8 words; zeros are code 1 in the bits of planes 1 to 3: 0b01010100
    assert page[16:32].tolist() == [0b01010100, 0b01010100, 0b01010100, 0b01011000, *[0b01010100] * 12]


def test_three_levels_in_digits_by_hand() -> None:
    # 64 channels: 13 bytes would do, 14 are whole words; byte w has channels w, 14 + w, 28 + w, 42 + w, 56 + w < 64
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, :, 0], x[0, 0, 33, 56], x[0, 0, 1, 63] = 1, -1, 1
    for code in (Codebook(levels=(-1, 0, 1)), Uniform(levels=3)):
        scheme = Scheme(keys=Store(code, scale=per_token(range="absmax")), values=ABSENT)
        page = reference.pages(scheme, Shape(64, 1), x, torch.zeros_like(x))[0, 0]
        # 0.11111 in base 3 is 121/243, of 256ths 127.5 rounded up; 0.21111 is 202/243, 212.8; 0.21110 201/243, 211.8;
        # 0.11112 122/243, 128.5; without a fifth channel 0.11110 is 120/243, 126.4
        assert page[28:56:2].tolist() == [213, *[128] * 6, 129, *[127] * 6]  # token 1: channel 63 is byte 7, digit 4
        assert page[29:56:2].tolist() == [212, *[128] * 7, *[127] * 6]  # token 33: channel 56 is byte 0, digit 4
        assert page[:28].tolist() == [213, 213, *[128] * 14, *[127] * 12]
        # rows of 28 bytes for 2 tokens, values of 2 bytes, one scale of 2 bytes a token
        assert len(page) == 32 * 28 + 64 * 64 * 2 + 64 * 2


def test_p27_digits_are_a_bijection() -> None:
    """P27: 243 tuples of digits have 243 bytes, which grow with them."""
    codes = torch.tensor([[v // 3**i % 3 for i in (4, 3, 2, 1, 0)] for v in range(243)])
    x = (codes - 1.0).repeat_interleave(8, 1)[:, :40].reshape(1, 1, 243, 5, 8)  # 40 channels are 8 bytes
    x = torch.nn.functional.pad(x.reshape(1, 1, 243, 40), (0, 0, 0, 13))
    scheme = Scheme(keys=Store(Uniform(levels=3), scale=Scale(Block(ALL, ALL, ALL), when="calibrated")), values=ABSENT)
    given = {"keys.scale": torch.tensor([1.0, -1]).reshape(2, 1, 1)}
    found = reference.pages(scheme, Shape(40, 1), x, torch.zeros_like(x), given)[0]
    rows = np.concatenate([page[: 32 * 16].reshape(32, 8, 2).transpose(2, 0, 1).reshape(64, 8) for page in found])
    assert (rows[:243] == rows[:243, :1]).all()
    assert len(set(rows[:243, 0].tolist())) == 243 and (np.diff(rows[:243, 0].astype(int)) > 0).all()
    never = set(range(256)) - set(rows[:243, 0].tolist())
    assert len(never) == 13


def test_a_sketch_by_hand() -> None:
    # 32 rows, one bit each: 2 words a token and 4 a row, planes of 4 channels at bits 0 to 7 of a byte
    encode = torch.zeros(1, 32, 64)
    encode[0, 9, 3] = 1  # row 9 = 4 * 2 + 1 sees channel 3
    params = {"keys.encode": encode, "keys.decode": encode.transpose(1, 2)}
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 7, 3], x[0, 0, 40, 3], x[0, 0, 41, 3] = 2, 4, -4
    scheme = Scheme(keys=Store(Sketch(32)), values=ABSENT)
    page = reference.pages(scheme, Shape(64, 1), x, torch.zeros_like(x), params)[0, 0]
    # tokens 7 (low byte of row 7) and 40 (high byte of row 8): word 1 of the row, bit 2
    ones = {int(i): int(page[i]) for i in page[:256].nonzero()[0]}
    assert ones == {7 * 8 + 2: 4, 8 * 8 + 2 + 1: 4}
    # values are 64 rows of 64 fp16 numbers; then fp16 root mean squares: 2 / 8, 4 / 8 twice
    norms = page[256 + 8192 :].view("<f2")
    assert norms[[7, 40, 41]].tolist() == [0.25, 0.5, 0.5] and np.count_nonzero(norms) == 3 and len(norms) == 64


@pytest.mark.parametrize("rows", [8, 24, 96, 160, 512])
def test_p27_every_sign_has_its_own_place(rows: int) -> None:
    scheme = Scheme(keys=Store(Sketch(rows, basis="gaussian")), values=ABSENT)
    x = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    coded = reference.quantize(scheme.keys, x)
    page = reference.pages(scheme, Shape(32, 1), x, torch.zeros_like(x))[0, 0]
    assert coded.codes is not None and int(np.unpackbits(page[: 8 * rows]).sum()) == int(coded.codes.sum())


def test_rows_of_numbers_stand_in_the_coded_space() -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 1, 0] = 3
    page = reference.pages(Scheme(both=Store(Float("fp16"), transform=Rotate())), Shape(64, 1), x, x)[0, 0]
    assert page.view("<f2")[64:128].tolist() == [0.375] * 64 and np.count_nonzero(page.view("<f2")) == 128
