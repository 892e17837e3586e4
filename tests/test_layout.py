"""The page: every bit in one place, sizes as the reference and the accounting have them."""

from __future__ import annotations

import pytest

from kvdsl import ALL, Block, Float, Recent, Scale, Scheme, Store, Uniform, bits, per_channel, per_token, reference
from kvdsl.codegen.bijection import prove_bijection
from kvdsl.codegen.layout import lay_out, widths
from kvdsl.errors import ProofError
from kvdsl.rules import shape_faults
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.shape import Shape

DIMS = (32, 40, 64, 72, 80, 96, 112, 128, 192, 256)


def kivi(code_bits: int) -> Scheme:
    return Scheme(
        keys=Store(Uniform(code_bits), scale=per_channel(tokens=32)),
        values=Store(Uniform(code_bits), scale=per_token()),
        recent=Recent(32),
    )


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_packing_is_a_bijection_without_padding(code_bits: int, head_dim: int) -> None:
    """P27: each bit of each stream belongs to one code; a page of b-bit codes holds b bits an element."""
    layout = lay_out(kivi(code_bits), Shape(head_dim, 2))
    prove_bijection(layout)
    for side in (layout.keys, layout.values):
        assert sum(s.size for s in side.streams) * 8 == layout.page_tokens * head_dim * code_bits
        assert sum(widths(code_bits)) == code_bits


def test_a_broken_map_is_refused() -> None:
    layout = lay_out(kivi(4), Shape(64, 1))
    stream = layout.keys.streams[0]
    object.__setattr__(stream, "places", (stream.places[0],) * len(stream.places))
    try:
        with pytest.raises(ProofError, match="4-bit stream"):
            prove_bijection(layout)
    finally:
        lay_out.cache_clear()


LEGAL = [(n, d) for n, s in SHIPPED.items() for d in (64, 128) if not shape_faults(s, Shape(d, 4))]


@pytest.mark.parametrize(("name", "head_dim"), LEGAL)
def test_pages_are_as_large_as_the_reference_and_the_accounting_say(name: str, head_dim: int) -> None:
    """P31: three descriptions of the same page agree to the byte."""
    scheme, shape = SHIPPED[name], Shape(head_dim, 4)
    layout = lay_out(scheme, shape)
    assert layout.page_bytes == reference.page_bytes(scheme, shape)
    stated = bits(scheme, head_dim=head_dim, kv_heads=4)
    assert stated.mean == pytest.approx(layout.page_bytes * 8 / (2 * layout.page_tokens * head_dim * 4), rel=1e-12)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(both=Store(Uniform(7), scale=per_token(heads=ALL, dtype="fp32"))),
        Scheme(both=Store(Uniform(4), scale=Scale(Block(64, ALL))), recent=Recent(64)),
        Scheme(keys=Store(Float("fp32")), values=Store(Uniform(1), scale=per_token(dtype="bf16"))),
    ],
)
def test_sections_are_aligned_and_apart(scheme: Scheme) -> None:
    """Every section starts at a multiple of 16 bytes and none runs into the next."""
    layout = lay_out(scheme, Shape(80, 4))
    spans = []
    for side in (layout.keys, layout.values):
        spans += [(s.offset, s.offset + s.size) for s in side.streams]
        if side.meta is not None and not side.meta.shared:
            spans.append((side.meta.offset, side.meta.offset + side.meta.size))
    spans.sort()
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] <= layout.head_bytes
