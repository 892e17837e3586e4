"""What a side's terms are of: each codes what the one before it left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kvdsl.kernels import Params
from kvdsl.reference.quantize import Quantized, left, quantize
from kvdsl.scheme import Store


class TermOf(NamedTuple):
    """One term of a tensor: its store alone, the place of its parameters, what it codes (B, H, T, D), what it keeps."""

    store: Store
    place: str
    x: Tensor
    kept: Quantized


def terms_of(store: Store, x: Tensor, params: Params | None, side: str, at: int = 0) -> Iterator[TermOf]:
    """The terms of x (B, H, T, D), whole blocks, the first token at position `at`."""
    for place, term in store.placed(side):
        alone = term.with_(residual=None)
        kept = quantize(alone, x, params, place, at)
        yield TermOf(alone, place, x, kept)
        x = left(x.double(), kept.decoded)
