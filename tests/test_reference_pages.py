"""The packed bytes of the reference: single numbers whose place was worked out by hand, and a place for every bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvdsl import reference
from kvdsl.errors import ShapeError
from kvdsl.scheme import ALL, Block, Float, Recent, Scale, Scheme, Store, Uniform, per_channel, per_token
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
    # a blob: 64 tokens * 64 codes * 2 bits = 1024 bytes twice, 2 * 64 and 2 * 64 words of 4 bytes
    assert reference.page_tokens(scheme) == 64 and reference.page_bytes(scheme, Shape(64, 2)) == 2 * (2048 + 2 * 512)
    first, second = reference.pages(scheme, Shape(64, 2), k, v)[0].view("<u4")
    blob = 3072 // 4
    assert first[blob + 512 + 64 + 5] == 0x3C003C00  # [block 1 of 2, channel 5] of head 1: fp16 1.0 and 1.0
    assert second[blob + 512 + 128 + 64 + 6] == 0x40004000  # [group 1, token 6]: fp16 2.0 and 2.0
    assert np.count_nonzero(first[[*range(512, 768), *range(blob + 512, blob + 768)]]) == 1


def test_shared_and_wide_metadata_by_hand() -> None:
    k = torch.zeros(1, 4, 64, 32)
    k[0, 2:, 9] = torch.linspace(1, 4, 64).reshape(2, 32)
    keys = Store(Uniform(2), scale=per_token(heads=2, dtype="fp32"))
    values = Store(Uniform(4), scale=per_token(heads=ALL, range="absmax"))
    scheme = Scheme(keys=keys, values=values)
    # blobs of 64 * 32 * (2 + 4) / 8 bytes, scales [2, 64] and offsets [2, 64] of 4 bytes, 64 scales of 2 bytes
    blob, total = 1536, 4 * 1536 + 1024 + 128
    assert reference.page_bytes(scheme, Shape(32, 4)) == total
    page = reference.pages(scheme, Shape(32, 4), k, k)[0, 0]
    tail = page[4 * blob : 4 * blob + 1024].view("<f4")
    assert tail[64 + 9] == 1 and tail[128 + 64 + 9] == 1 and np.count_nonzero(tail) == 2
    shared = page[4 * blob + 1024 :].view("<f2")
    assert shared[9] == np.float16(4 / 7) and np.count_nonzero(shared) == 1


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
