"""The bytes of the packed format, laid down one plane of one token at a time.

A page holds `page_tokens` tokens of all kv heads of one layer: one blob a head, then the metadata that heads share,
rounded up to 16 bytes.  A blob holds key codes, value codes, key metadata, value metadata, those of what a store left
and of stretches one behind the other; every section starts at a multiple of 16 bytes.

Three levels for which no bits are asked are ternary digits, five in a byte.  A row is again tokens t and t + 32, one in
the low bytes and one in the high bytes of W words; W is a fifth of the channels rounded up to an even number.  Byte w
holds channels w, w + W, ..., w + 4W as the digits d of a number 0.ddddd of base 3, the first channel's digit first,
those beyond the last channel 0: the byte is the number of 256ths of it, rounded up.

Channels that share a code are as one: where this speaks of a channel's code, it is that of a group of them.  Of sums of
vectors the codes of a token are one string of bits, the first code's lowest, whose bytes are as codes of 8 bits.

A side's codes are those of the space that is coded: M channels, head_dim but for a sketch.  A minifloat's code is its
bits, a sketch's one bit; numbers in fp16 and fp32 stand as they are, row after row.  Of low rank all is in fp16: where
codes would be, one row a vector of the numbers that the page's tokens have of it; where metadata would be, the vectors.
Factors of tiles stand behind the metadata, in fp16: one a token, or a row of channels a tile.
Of channels that are chosen anew numbers stand where codes would be, and which they are, rising, behind the metadata.

Codes are cut into streams of 8, 4, 2 or 1 bits, the widest with the top bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1), each stream a section of 16-bit little-endian words.  A row of words is one token, or two tokens (32
apart, one in the low bytes, one in the high bytes) where one token would fill fewer than 16 words, or 32 of codes of
vectors.  The channels are cut into planes of equal width; channel x of plane j stands in word x of its tile, at the
place of the plane.

Choices where several readings are possible: a stored zero has no sign; a NaN scale is the positive quiet NaN without
payload (under `in_scale` with the zero point in its low bits); scales of shared metadata in fp32 with an offset stand
all before all offsets, those of 8-bit formats are the low and the high byte of one 16-bit word; heads share metadata
when a block spans more than one head of the tensor at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvdsl.codes import Additive, Chosen, Codebook, Float, LowRank, Sparse, Uniform, Vectors
from kvdsl.errors import ShapeError
from kvdsl.scheme import SIDES, Band, Scale, Scheme, Side, Store

from .additive import row_bytes
from .alphabets import code_bits, has_offset, holds_numbers
from .page_parts import (
    Bytes,
    put,
    put_across,
    put_channels,
    put_chosen,
    put_factors,
    put_floats,
    put_slots,
    slots_of,
    words,
)
from .quantize import Params, Quantized, quantize
from .spaces import channels_of

if TYPE_CHECKING:
    from kvdsl.shape import Shape

STREAMS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1, "e8m0": 1}


@dataclass(frozen=True)
class _Places:
    """Byte offsets of a side's sections: every stream (or the floats) in a blob, the metadata in a blob or the page."""

    codes: tuple[int, ...]
    metadata: int | None
    shared: bool
    channels: int | None = None
    across: int | None = None


def page_tokens(scheme: Scheme) -> int:
    """Tokens a page holds: whole rows of words, and whole blocks of both sides."""
    stores = _stores(scheme).values()
    choices = [part.tokens for store in stores for part in (store.chosen, store.balance) if part is not None]
    return math.lcm(128 if _few_bits(scheme) else 64, *map(_block_tokens, stores), *choices)


def _few_bits(scheme: Scheme) -> bool:
    """Whether both sides are codes of even levels and nothing else, of 6 bits a key's and a value's number at most."""
    stores = _stores(scheme)
    if len(stores) > 2 or scheme.shared or any(store.rope is not None for store in stores.values()):
        return False
    bits = [store.code.bits if isinstance(store.code, Uniform) else None for store in stores.values()]
    return None not in bits and sum(b or 0 for b in bits) <= 6


def page_bytes(scheme: Scheme, shape: Shape) -> int:
    """Bytes of a page of one layer."""
    return _places(scheme, shape)[2]


def pages(scheme: Scheme, shape: Shape, k: Tensor, v: Tensor, params: Params | None = None) -> Bytes:
    """The bytes of k and v (B, H, T, D), all T tokens packed: uint8 (B, ceil(T / page_tokens), page_bytes).

    Give the tokens that follow the sinks: their positions begin there.  Bytes of tokens beyond T are 0.  Raises
    ShapeError if the tensors do not fit `shape` or T is not whole blocks.
    """
    for name, x in (("k", k), ("v", v)):
        dim = scheme.dim("keys" if name == "k" else "values", shape.head_dim)
        right = (k.shape[0], shape.kv_heads, k.shape[2], dim)
        if tuple(x.shape) != right:
            raise ShapeError(f"{name}: shape {tuple(x.shape)}; the right one is {right}")
    batch, heads, tokens, _ = k.shape
    size = page_tokens(scheme)
    blob, places, total = _places(scheme, shape)
    out: Bytes = np.zeros((batch, -(-tokens // size), total), np.uint8)
    kept = {side: quantize(scheme.side(side), x, params, side, scheme.sinks.tokens if scheme.sinks else 0)
            for side, x in zip(SIDES, (k, v), strict=True)}  # fmt: skip
    for (side, depth), store in _stores(scheme).items():
        coded, place = kept[side].terms[depth], places[side, depth]
        if place.channels is not None and coded.channels is not None and store.chosen is not None:
            put_channels(out, place.channels, coded.channels, blob, size // store.chosen.tokens)
        if isinstance(store.code, Chosen):
            numbers = coded.coded if coded.codes is None else coded.codes
            put_chosen(out, place.codes[0], numbers, store.code, blob, size)
            continue
        starts = place.codes[0], place.metadata or 0
        if coded.factors is not None:
            put_factors(out, starts, coded.factors, blob, size // _block_tokens(store), size)
            continue
        if coded.slots is not None:
            put_slots(out, starts, coded.slots, blob, size, side)
            continue
        for t in range(tokens):
            page = out[:, t // size]
            for h in range(heads):
                here = page[:, h * blob : (h + 1) * blob]
                if holds_numbers(store):
                    assert isinstance(store.code, Float)
                    put_floats(here, place.codes[0], coded.coded[:, h, t], t % size, store.code)
                else:
                    assert coded.codes is not None
                    codes = coded.codes[:, h, t].numpy()
                    codes = row_bytes(codes, store.code) if isinstance(store.code, Additive) else codes
                    _put_codes(here, place.codes, codes, t % size, store, size)
        if place.across is not None and coded.across is not None:
            assert store.balance is not None
            one = store.of_tokens
            rows, of_page = (
                coded.across[..., None] if one else coded.across,
                size // (1 if one else store.balance.tokens),
            )
            put_across(out, place.across, rows, blob, of_page)
        if place.metadata is not None and store.measure is not None:
            _put_metadata(out, place, coded, store.measure, store, heads, blob, size)
    return out


def _stores(scheme: Scheme) -> dict[tuple[Side, int], Store]:
    """The stores of a page in its order: those of the keys, each before that of what it left, then of the values, where
    these are no stretch of the keys."""
    sides = SIDES[:1] if scheme.shared else SIDES
    return {(side, depth): store for side in sides for depth, store in enumerate(scheme.side(side).terms)}


def _places(scheme: Scheme, shape: Shape) -> tuple[int, dict[tuple[Side, int], _Places], int]:
    """Bytes of a head's blob, the places of all stores, bytes of a page."""
    size, stores = page_tokens(scheme), _stores(scheme)
    width = {at: channels_of(store, shape.head_dim) for at, store in stores.items()}
    end = 0
    codes: dict[tuple[Side, int], tuple[int, ...]] = {}
    for at, store in stores.items():
        starts = []
        if isinstance(store.code, Sparse):
            codes[at] = (end,)
            end = _aligned(end + 2 * slots_of(store, at[0], width[at], size))
            continue
        if isinstance(store.code, Chosen):
            codes[at] = (end,)
            end = _aligned(end + size * width[at] * store.code.bits // 8)
            continue
        for bits in _widths(store):
            starts.append(end)
            numbers = 1 if isinstance(store.code, LowRank) else width[at]
            numbers = numbers // store.code.channels if isinstance(store.code, Vectors) else numbers
            numbers = store.code.of(width[at]).row if isinstance(store.code, Additive) else numbers
            row_bits = 8 * _digit_bytes(width[at]) if _ternary(store) else numbers * bits
            end = _aligned(end + size * row_bits // 8)
        codes[at] = tuple(starts)
    metadata: dict[tuple[Side, int], int | None] = {}
    channels: dict[tuple[Side, int], int] = {}
    across: dict[tuple[Side, int], int] = {}
    for at, store in stores.items():
        metadata[at] = end if _has_metadata(store) else None
        if _has_metadata(store) and not _shares(store, shape.kv_heads):
            bytes_ = slots_of(store, at[0], width[at], size) if isinstance(store.code, Sparse) else None
            end = _aligned(end + (bytes_ or _metadata_bytes(store, 1, width[at], size)))
        if store.balance is not None:
            across[at] = end
            end = _aligned(end + 2 * (size if store.of_tokens else size // store.balance.tokens * width[at]))
        if store.chosen is not None:
            channels[at] = end
            end = _aligned(end + size // store.chosen.tokens * store.chosen.count(shape.head_dim))
    blob = end
    end = blob * shape.kv_heads
    for at, store in stores.items():
        if _has_metadata(store) and _shares(store, shape.kv_heads):
            metadata[at] = end
            groups = shape.kv_heads // _heads(store, shape.kv_heads)
            end = _aligned(end + _metadata_bytes(store, groups, width[at], size))
    places = {
        at: _Places(codes[at], metadata[at], _shares(store, shape.kv_heads), channels.get(at), across.get(at))
        for at, store in stores.items()
    }
    return blob, places, end


def _aligned(offset: int) -> int:
    return -(-offset // 16) * 16


def _ternary(store: Store) -> bool:
    """Whether codes are digits of base 3, five in a byte."""
    code = store.code
    if isinstance(code, Codebook):
        return code.bits is None and isinstance(code.levels, tuple) and len(code.levels) == 3
    return isinstance(code, Uniform) and code.bits is None and code.levels == 3


def _digit_bytes(d: int) -> int:
    """Bytes of the ternary digits of a token."""
    fifth = math.ceil(d / 5)
    return fifth + fifth % 2


def _widths(store: Store) -> tuple[int, ...]:
    """Bits of every code section, a number's own bits where numbers are kept; of low rank all of a token."""
    if isinstance(store.code, LowRank):
        return (16 * store.code.rank,)
    return (code_bits(store),) if holds_numbers(store) else STREAMS[code_bits(store)]


def _has_metadata(store: Store) -> bool:
    if isinstance(store.code, (LowRank, Sparse)):
        return True  # the vectors of a block, or places
    if isinstance(store.code, Chosen):
        return False
    return not holds_numbers(store) and store.measure is not None and store.measure.when == "online"


def _block_tokens(store: Store) -> int:
    if isinstance(store.code, (LowRank, Sparse)):
        return store.code.tokens
    if not _has_metadata(store):
        return 1
    assert store.measure is not None and isinstance(store.measure.block.tokens, int)
    return store.measure.block.tokens


def _heads(store: Store, heads: int) -> int:
    assert store.measure is not None
    count = store.measure.block.heads
    return count if isinstance(count, int) else heads


def _shares(store: Store, heads: int) -> bool:
    return not isinstance(store.code, (LowRank, Sparse)) and _has_metadata(store) and _heads(store, heads) > 1


def _groups(store: Store, d: int) -> int:
    assert store.measure is not None
    channels = store.measure.block.channels
    return d // channels if isinstance(channels, int) else 1


def _entry_bytes(scale: Scale) -> int:
    """Bytes a block's metadata takes: scale and offset, the offset free inside the scale."""
    return (2 if has_offset(scale) and not scale.zero_inside else 1) * BYTES[scale.dtype]


def _metadata_bytes(store: Store, head_groups: int, d: int, size: int) -> int:
    if isinstance(store.code, LowRank):
        return size // store.code.tokens * store.code.rank * d * 2
    assert store.measure is not None
    return head_groups * _groups(store, d) * (size // _block_tokens(store)) * _entry_bytes(store.measure)


def _paired(store: Store, d: int, width: int) -> bool:
    """Whether a row of words of this stream of d codes a token holds two tokens."""
    return d * width % 16 != 0 or d * width // 16 < (32 if isinstance(store.code, Vectors) else 16)


def _plane(store: Store, d: int) -> int:
    """Channels of a plane, the same for all streams of a store; of polar coordinates it is of radii or of angles."""
    plane = _common_plane(store, d)
    while store.polar and not isinstance(store, Band) and d // 2 % plane:
        plane //= 2
    return plane


def _common_plane(store: Store, d: int) -> int:
    natural = min(d * width // (8 if _paired(store, d, width) else 16) for width in _widths(store))
    if not _has_metadata(store) or _block_tokens(store) > 1 or _groups(store, d) == 1:
        return natural
    channels, plane = d // _groups(store, d), natural
    while channels % plane:
        if plane % 2 or plane // 2 < 16:
            return natural
        plane //= 2
    return natural if d // plane > 16 else plane


def _put_codes(blob: Bytes, starts: tuple[int, ...], codes: Any, t: int, store: Store, size: int) -> None:
    """Codes (B, D) of token t of the page into blobs (B, bytes)."""
    if _ternary(store):
        _put_digits(blob, starts[0], codes, t)
        return
    d = codes.shape[1]
    plane = _plane(store, d)
    below = code_bits(store)
    for start, width in zip(starts, _widths(store), strict=True):
        below -= width
        part = (codes >> below) & ((1 << width) - 1)
        in_byte = 8 // width
        for j in range(d // plane):
            if _paired(store, d, width):
                row, byte, tile, slot = t // 64 * 32 + t % 32, t % 64 // 32, j // in_byte, j % in_byte
                row_bytes = d * width // 8 * 2
            else:
                in_word = j % (2 * in_byte)
                row, byte, tile, slot = t, in_word // in_byte, j // (2 * in_byte), in_word % in_byte
                row_bytes = d * width // 16 * 2
            first = start + row * row_bytes + 2 * tile * plane + byte
            placed = part[:, j * plane : (j + 1) * plane] << (slot * width)
            blob[:, first : first + 2 * plane : 2] |= placed.astype(np.uint8)


def _put_digits(blob: Bytes, start: int, digits: Any, t: int) -> None:
    """Ternary digits (B, D) of token t of the page into blobs (B, bytes)."""
    count, d = digits.shape
    row = _digit_bytes(d)
    padded = np.zeros((count, 5 * row), np.int64)
    padded[:, :d] = digits
    of_243 = padded.reshape(count, 5, row).transpose(0, 2, 1) @ np.array([81, 27, 9, 3, 1])
    first = start + (t // 64 * 32 + t % 32) * 2 * row + t % 64 // 32
    blob[:, first : first + 2 * row : 2] = np.ceil(of_243 * 256 / 243)


def _put_metadata(
    out: Bytes, place: _Places, coded: Quantized, scale: Scale, store: Store, heads: int, blob: int, size: int
) -> None:
    """Scale and offset of every block, (B, head groups, token blocks, channel groups), into pages (B, pages, bytes)."""
    assert coded.scale is not None and place.metadata is not None
    s = words(coded.scale, scale.dtype)
    o = None
    if scale.zero_inside and coded.offset is not None:
        s = s | coded.offset.to(torch.int64).numpy()
    elif coded.offset is not None:
        o = words(coded.offset, scale.dtype)
    _, head_groups, blocks, groups = s.shape
    page_blocks = size // _block_tokens(store)
    entries = page_blocks * groups
    for h in range(head_groups):
        for block in range(blocks):
            for g in range(groups):
                page, inner = divmod(block, page_blocks)
                entry = inner * groups + g if _block_tokens(store) > 1 else g * page_blocks + inner
                base = place.metadata + (0 if place.shared else h * blob)
                index = h * entries + entry if place.shared else entry
                count = head_groups * entries if place.shared else entries
                scales, offsets = s[:, h, block, g], None if o is None else o[:, h, block, g]
                target = out[:, page]
                width = BYTES[scale.dtype]
                if offsets is None:
                    put(target, base + width * index, scales, width)
                elif scale.dtype == "fp32":
                    put(target, base + 4 * index, scales, 4)
                    put(target, base + 4 * (count + index), offsets, 4)
                else:
                    put(target, base + 2 * width * index, scales | offsets << 8 * width, 2 * width)
