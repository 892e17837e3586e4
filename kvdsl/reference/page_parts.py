"""Sections of a page that hold no codes, byte by byte: numbers, vectors of low rank, slots, chosen channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvdsl.codes import SLOT_TOKENS, Chosen, Float, Sparse
from kvdsl.scheme import Side, Store

from .rounding import BIAS, FORMATS, MINIFLOATS, exponent, minifloat_bits

Bytes = npt.NDArray[np.uint8]
NAN = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}


def put_floats(blob: Bytes, start: int, numbers: Tensor, t: int, code: Float) -> None:
    """Numbers (B, D) of token t of the page into blobs (B, bytes), in the code's float format."""
    raw = words(numbers, code.format).astype("<u2" if code.format == "fp16" else "<u4").view(np.uint8)
    blob[:, start + t * raw.shape[1] : start + (t + 1) * raw.shape[1]] = raw


def put_factors(
    out: Bytes, starts: tuple[int, int], factors: tuple[Tensor, Tensor], blob: int, page_blocks: int, size: int
) -> None:
    """Numbers a (B, H, T, rank), a row a vector where codes would be, and vectors b (B, H, blocks, rank, D), a row a
    block where metadata would be, into pages (B, pages, bytes)."""
    sections = [(starts[0] + 2 * size * j, a[..., None], size) for j, a in enumerate(factors[0].unbind(-1))]
    for start, rows, of_page in (*sections, (starts[1], factors[1].flatten(3), page_blocks)):
        for i in range(rows.shape[2]):
            for h in range(rows.shape[1]):
                here = out[:, i // of_page, h * blob : (h + 1) * blob]
                put_floats(here, start, rows[:, h, i], i % of_page, Float("fp16"))


def put_across(out: Bytes, start: int, across: Tensor, blob: int, of_page: int) -> None:
    """Factors of tiles into pages (B, pages, bytes): rows (B, H, T, 1) of tokens, or (B, H, tiles, D) of channels, so
    many of a page."""
    for i in range(across.shape[2]):
        for h in range(across.shape[1]):
            here = out[:, i // of_page, h * blob : (h + 1) * blob]
            put_floats(here, start, across[:, h, i], i % of_page, Float("fp16"))


def slots_of(store: Store, side: Side, d: int, size: int) -> int:
    """Single numbers of a page of one head: those of every token of keys, of every channel of 64 tokens of values."""
    assert isinstance(store.code, Sparse)
    return store.code.slots * (size if side == "keys" else size // SLOT_TOKENS * d)


def put_slots(
    out: Bytes, starts: tuple[int, int], slots: tuple[Tensor, Tensor], blob: int, size: int, side: Side
) -> None:
    """Places and numbers of single numbers into pages (B, pages, bytes): of keys (B, H, T, slots), a row of the page's
    tokens for every slot; of values (B, H, T / 64, slots, D), a row of channels for every slot of a block."""
    places, numbers = slots
    batch, heads, rows, count = places.shape[:4]
    of_page = size if side == "keys" else size // SLOT_TOKENS
    for i in range(rows):
        for h in range(heads):
            here = out[:, i // of_page, h * blob : (h + 1) * blob]
            for slot in range(count):
                which = places[:, h, i, slot].reshape(batch, -1).numpy()
                raw = words(numbers[:, h, i, slot].reshape(batch, -1), "fp16").astype("<u2").view(np.uint8)
                width = which.shape[1]
                at = slot * size + i % size if side == "keys" else (i % of_page * count + slot) * width
                here[:, starts[1] + at : starts[1] + at + width] = which
                here[:, starts[0] + 2 * at : starts[0] + 2 * (at + width)] = raw


def put_chosen(out: Bytes, start: int, numbers: Tensor, code: Chosen, blob: int, size: int) -> None:
    """Numbers (B, H, T, n) of chosen channels into pages (B, pages, bytes), a row a token: fp16, or bits of which those
    of neighbouring tokens share a byte, the first token's lowest."""
    together = 8 // code.bits if code.below else 1
    for t in range(numbers.shape[2]):
        for h in range(numbers.shape[1]):
            here = out[:, t // size, h * blob : (h + 1) * blob]
            if not code.below:
                put_floats(here, start, numbers[:, h, t], t % size, Float("fp16"))
                continue
            bits = numbers[:, h, t].numpy() << t % together * code.bits
            first = start + t % size // together * bits.shape[1]
            here[:, first : first + bits.shape[1]] |= bits.astype(np.uint8)


def put_channels(out: Bytes, start: int, channels: Tensor, blob: int, of_page: int) -> None:
    """Which channels are chosen, (B, H, T / per, n), a byte each, into pages (B, pages, bytes)."""
    count = channels.shape[3]
    for i in range(channels.shape[2]):
        for h in range(channels.shape[1]):
            first = h * blob + start + i % of_page * count
            out[:, i // of_page, first : first + count] = channels[:, h, i].numpy()


def words(numbers: Tensor, dtype: str) -> Any:
    """Bit patterns of float64 numbers that the format holds exactly, int64; one NaN for all."""
    if dtype in MINIFLOATS:
        return minifloat_bits(numbers, MINIFLOATS[dtype]).numpy()
    if dtype == "e8m0":
        return torch.where(numbers.isnan(), 255, exponent(numbers.nan_to_num(1.0)).to(torch.int64) + BIAS).numpy()
    narrow = numbers.to(FORMATS[dtype]).contiguous()  # type: ignore[index]
    bits = narrow.view(torch.int32 if dtype == "fp32" else torch.int16).to(torch.int64)
    bits = bits & (0xFFFFFFFF if dtype == "fp32" else 0xFFFF)
    return torch.where(numbers.isnan(), torch.full_like(bits, NAN[dtype]), bits).numpy()


def put(target: Bytes, address: int, words: Any, count: int) -> None:
    """Little-endian words (B,) at an address of every row."""
    for i in range(count):
        target[:, address + i] = (words >> (8 * i) & 0xFF).astype(np.uint8)
