"""The page: every bit in one place, sizes as the reference and the accounting have them."""

from __future__ import annotations

import pytest
import torch

from kvdsl import ALL, Block, Float, Recent, Scale, Scheme, Store, Uniform, bits, per_channel, per_token, reference
from kvdsl.codegen.bijection import digits_byte, prove_bijection, prove_digits
from kvdsl.codegen.host import digit, digits_bytes
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


@pytest.mark.parametrize("head_dim", DIMS)
def test_digits_are_a_bijection_that_the_accounting_knows(head_dim: int) -> None:
    """P27: each digit of each byte is of one code at most; rows are whole words; bits stated are bytes stored."""
    scheme, shape = Scheme(both=Store(Uniform(levels=3), scale=per_token(heads=ALL))), Shape(head_dim, 2)
    layout = lay_out(scheme, shape)
    proofs = prove_bijection(layout)
    assert [proof.unit for proof in proofs] == ["digit"] * 2 and proofs[0].cases == 64 * head_dim
    (stream,) = layout.keys.streams
    assert stream.row_words % 2 == 0 and 0 <= 5 * stream.row_words - head_dim < 10
    assert bits(scheme, head_dim, 2).side("keys").code == 8 * stream.row_words / head_dim
    assert layout.page_bytes == reference.page_bytes(scheme, shape)
    spans = layout.keys.spans
    assert [channel for span in spans for channel in span.channels] == list(range(head_dim))


def test_planes_of_digits_are_cut_where_groups_end() -> None:
    layout = lay_out(Scheme(both=Store(Uniform(levels=3), scale=per_token(64))), Shape(128, 1))
    assert [(span.channels[0], len(span.channels)) for span in layout.keys.spans] == [
        (0, 26), (26, 26), (52, 12), (64, 14), (78, 26), (104, 24)
    ]  # fmt: skip


def test_every_byte_gives_its_digits_back() -> None:
    """P27: all tuples of digits, through the torch backend's arithmetic and the proof's."""
    assert prove_digits() == 243
    codes = torch.cartesian_prod(*[torch.arange(3)] * 5).to(torch.uint8)
    found = digits_bytes(codes.repeat_interleave(2, 1), 2)
    assert (found[:, :1] == found).all() and len(set(found[:, 0].tolist())) == 243
    assert found[:, 0].tolist() == [digits_byte(tuple(row)) for row in codes.tolist()]
    assert all((digit(found[:, 0], j) == codes[:, j]).all() for j in range(5))
    assert int(digit(torch.arange(256), 4).max()) == 2  # bytes that are never written have digits, too


def test_digits_that_meet_are_refused() -> None:
    layout = lay_out(Scheme(both=Store(Uniform(levels=3), scale=per_token())), Shape(64, 1))
    stream = layout.keys.streams[0]
    object.__setattr__(stream, "row_words", 12)
    try:
        with pytest.raises(ProofError, match="digits meet"):
            prove_bijection(layout)
    finally:
        lay_out.cache_clear()


def test_a_broken_map_is_refused() -> None:
    layout = lay_out(kivi(4), Shape(64, 1))
    stream = layout.keys.streams[0]
    object.__setattr__(stream, "places", (stream.places[0],) * len(stream.places))
    try:
        with pytest.raises(ProofError, match="4-bit stream"):
            prove_bijection(layout)
    finally:
        lay_out.cache_clear()


LEGAL = [(n, d) for n, s in SHIPPED.items() for d in (64, 128) if not s.routed and not shape_faults(s, Shape(d, 4))]


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
