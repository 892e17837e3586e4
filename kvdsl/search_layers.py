"""How much a layer's attention suffers from each pair of bits, on what a text gives its cache to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .api import roundtrip
from .cost import page_tokens
from .kernels import Backend, Params
from .scheme import Scheme
from .search_pairs import Pair

Observed = tuple[Tensor, Tensor, Tensor | None]


def output_errors(
    scheme_of: Callable[[Pair], Scheme],
    layer: Observed,
    bits: Sequence[int],
    params: Params | None = None,
    backend: Backend | None = None,
) -> dict[Pair, float]:
    """|out^ - out| / |out| of causal attention for every pair of `bits`; `layer` as kvdsl.hf.observed gives it.

    Every token is quantized, no window is kept exact; tokens behind the last whole page are left out.  Attention is the
    plain one: no sliding window, no soft-capping, scores over sqrt(head_dim).
    """
    keys, values, queries = layer
    assert queries is not None
    held = {b: scheme_of((b, b)) for b in bits}
    page = max(page_tokens(scheme) for scheme in held.values())
    whole = keys.shape[2] // page * page
    k, v, q = (x[:, :, :whole].float() for x in (keys, values, queries))
    read = {b: roundtrip(one, k, v, window=False, params=params, backend=backend) for b, one in held.items()}
    exact = _attention(q, k, v)
    size = exact.norm()
    found = {}
    for key_bits, value_bits in product(bits, repeat=2):
        out = _attention(q, read[key_bits][0], read[value_bits][1])
        found[key_bits, value_bits] = ((out - exact).norm() / size).item()
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
