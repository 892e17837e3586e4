"""The definitions, executable: what every scheme means, in plain float64 torch.

This package is what generated kernels are checked against.  It is written from the definitions of the language with
loops where loops are clearer, imports the language, its tables and matrices, and torch, and nothing of the compiler.

    rounding    float32 steps, metadata formats, minifloats, the ways to round to an integer
    spaces      the map into the space that is coded, and back
    alphabets   codes of numbers, numbers of codes
    measure     scales and offsets of blocks
    quantize    one store applied to one tensor: codes, stored scales and offsets, decoded numbers
    queries     products of queries, rounded or not, with what a cache holds
    timeline    which tokens are packed when
    attention   roundtrip, scores and attend on a whole sequence
    streams     the cache as a plain object that grows
    pages       the bytes of the packed format
    routed      a cache with tiers that grows; choices, saliency and tiers are its parts
"""

from __future__ import annotations

from .attention import attend, roundtrip, scores
from .pages import page_bytes, page_tokens, pages
from .quantize import Quantized, encoded_rows, maps, quantize
from .routed import RoutedStream
from .streams import Stream, stream
from .timeline import packed_tokens

__all__ = [
    "Quantized",
    "RoutedStream",
    "Stream",
    "attend",
    "encoded_rows",
    "maps",
    "packed_tokens",
    "page_bytes",
    "page_tokens",
    "pages",
    "quantize",
    "roundtrip",
    "scores",
    "stream",
]
