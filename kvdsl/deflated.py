"""Pages of a snapshot as DEFLATE streams of variable length, one for each, so that a damaged one is named.

Codes of uneven shares, scales that are alike, and places of a page that no token has filled yet take fewer bytes so
(KVTC, arXiv 2511.01815).  Attention does not read streams: a page is inflated to the bytes that it was before it is
held again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CacheError

Document = dict[str, Any]
Tensors = dict[str, Tensor]
FIELD = "deflate"  # of a document: the level, where pages are streams
LENGTHS = "lengths"  # int32 (P,): bytes of each stream


def refuse_level(level: int | None) -> None:
    """CacheError unless it is None, for pages as they are, or a level of DEFLATE."""
    if level is not None and (type(level) is not int or not 1 <= level <= 9):
        raise CacheError(f"deflate: {level!r} is no level; give 1, the fastest, to 9, or None for pages as they are")


def deflated(document: Document, tensors: Mapping[str, Tensor], level: int | None) -> tuple[Document, Tensors]:
    """A snapshot on the CPU, its `pages` (P, page_bytes) one behind the other as streams, uint8 (bytes,); as it is
    where there is no level."""
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if level is None:
        return document, held
    streams = [zlib.compress(page.numpy().data, level) for page in held["pages"]]
    joined = bytearray(b"".join(streams))
    held["pages"] = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    held[LENGTHS] = torch.tensor([len(stream) for stream in streams], dtype=torch.int32)
    return document | {FIELD: level}, held


def inflated(document: Document, tensors: Mapping[str, Tensor]) -> tuple[Document, Tensors]:
    """The snapshot that `deflated` was given.  CacheError naming the first stream that is damaged, or is of a page of
    another size."""
    if FIELD not in document:
        return document, dict(tensors)
    lengths, data, size = tensors[LENGTHS].tolist(), tensors["pages"].numpy().data, document["page_bytes"]
    if min(lengths, default=1) < 1 or sum(lengths) != len(data):
        raise CacheError(f"saved cache: streams of {sum(lengths)} bytes are told, and there are {len(data)}")
    pages, begin = bytearray(), 0
    for position, length in enumerate(lengths):
        pages += _page(data[begin : begin + length], size, position)
        begin += length
    flat = torch.frombuffer(pages, dtype=torch.uint8) if pages else torch.empty(0, dtype=torch.uint8)
    others = {name: tensor for name, tensor in tensors.items() if name != LENGTHS}
    whole = {key: value for key, value in document.items() if key != FIELD}
    return whole, others | {"pages": flat.view(len(lengths), size)}


def _page(stream: memoryview, size: int, position: int) -> bytes:
    """The `size` bytes of one stream; no more are made of it, whatever it says."""
    reader = zlib.decompressobj()
    try:
        page = reader.decompress(stream, size + 1)
    except zlib.error as error:
        raise CacheError(f"saved cache: the stream of page {position} is damaged ({error})") from error
    if len(page) != size or not reader.eof or reader.unused_data:
        raise CacheError(f"saved cache: the stream of page {position} is damaged: it is not one of {size} bytes")
    return page
