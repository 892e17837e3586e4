"""The bits that are printed are the bits that are stored."""

from __future__ import annotations

import pytest

from kvdsl.codegen.layout import lay_out
from kvdsl.cost import bits
from kvdsl.errors import SchemeError, ShapeError
from kvdsl.rules import shape_faults
from kvdsl.scheme import Block, Recent, Scale, Scheme, Sinks, Store, Uniform, per_channel, per_token
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.schemes import fp16, int8_tensor, int8_token_head, kivi2, qjl
from kvdsl.shape import Shape

PUBLISHED = {"fp16": 16, "fp32": 32, "kivi2": 3, "kivi4": 5, "int8_token_head": 8.25, "int4_token_head": 4.25}
PUBLISHED |= {"int8_tensor": 8, "bitdecoding4": 4.25, "bitdecoding2": 2.25}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_figures(name: str) -> None:
    counted = bits(SHIPPED[name])
    assert (counted.keys, counted.values, counted.mean) == (PUBLISHED[name],) * 3


WIDE = Scheme(both=Store(Uniform(2), scale=Scale(Block(64), range="absmax")), recent=Recent(64))
SHARED = Scheme(both=Store(Uniform(3), scale=Scale(Block(64, heads=2), range="absmax")), recent=Recent(64))
MIXED = Scheme(
    keys=Store(Uniform(5), scale=per_channel(tokens=48, dtype="fp32")),
    values=Store(Uniform(7), scale=per_token(channels=16, zero="point")),
    recent=Recent(48),
)


ODD = {"wide": WIDE, "shared": SHARED, "mixed": MIXED}
FITTING = [
    pytest.param(scheme, shape, id=f"{name}-{shape.head_dim}")
    for name, scheme in {**SHIPPED, **ODD}.items()
    for shape in (Shape(64, 4), Shape(80, 4), Shape(128, 2))
    if not shape_faults(scheme, shape)
]


@pytest.mark.parametrize(("scheme", "shape"), FITTING)
def test_bits_are_the_bytes_of_a_page(scheme: Scheme, shape: Shape) -> None:
    page = lay_out(scheme, shape)
    elements = 2 * page.page_tokens * shape.head_dim * shape.kv_heads
    counted = bits(scheme, head_dim=shape.head_dim, kv_heads=shape.kv_heads)
    assert counted.mean == pytest.approx(8 * page.page_bytes / elements, abs=1e-12)


def test_digits_take_the_bytes_of_their_rows() -> None:
    """Five in a byte, an even number of bytes a row: 1.6 bits where that is exact."""
    store = Store(Uniform(levels=3), scale=per_token())
    counted = {d: bits(Scheme(both=store), head_dim=d).side("keys").code for d in (32, 64, 80, 96, 128, 256)}
    assert counted == {32: 2, 64: 1.75, 80: 1.6, 96: 5 / 3, 128: 1.625, 256: 1.625}
    assert bits(Scheme(both=store)).formula("keys") == "1.625 + (16 + 16)/128 = 1.875 bits"
    assert bits(Scheme(both=store.with_(bits=2))).side("keys").code == 2


def test_padding_is_counted_apart() -> None:
    side = bits(WIDE).side("keys")  # one fp16 scale in a section of 16 bytes
    assert (side.code, side.metadata, side.padding) == (2, 16 / 8192, 112 / 8192)
    assert bits(kivi2).padding == 0


def test_the_parts_add_up() -> None:
    for scheme in SHIPPED.values():
        counted = bits(scheme, tokens=1000)
        assert counted.code + counted.metadata + counted.padding + counted.window == pytest.approx(counted.mean)


def test_a_window_is_exact_tokens_at_sixteen_bits() -> None:
    counted = bits(kivi2.with_(sinks=Sinks(4)), tokens=1000)
    assert counted.side("keys").exact == pytest.approx((4 + 996 % 128) / 1000)
    assert counted.side("values").exact == pytest.approx((4 + 128) / 1000)
    assert counted.values == pytest.approx(0.132 * 16 + 0.868 * 3)
    assert bits(kivi2, tokens=100).mean == 16


def test_calibrated_numbers_are_constants() -> None:
    assert bits(int8_tensor).constants == 8
    static = per_channel(when="calibrated")  # scale and offset of every head and channel
    assert bits(Scheme(keys=Store(Uniform(8), scale=static), values=Store())).constants == 2 * 4 * 8 * 128
    assert bits(kivi2).constants == 0


def test_layers_are_averaged() -> None:
    assert bits(kivi2.with_(layers={0: fp16, -1: fp16}), layers=32).mean == (2 * 16 + 30 * 3) / 32
    assert bits(kivi2.with_(layers={0: fp16})).mean == 3
    assert bits(qjl, layers=32).keys == (15 * (512 + 16) / 128 + 17 * (256 + 16) / 128) / 32


def test_formulas_say_what_is_divided_by_what() -> None:
    assert bits(kivi2).formula("keys") == "2 + (16 + 16)/32 = 3 bits"
    assert bits(int8_token_head, head_dim=80).formula("values") == "8 + 32/80 = 8.4 bits"
    assert bits(int8_tensor).formula("keys") == "8 bits"
    assert bits(WIDE).formula("keys") == "2 + 16/8192 + 0.0136719 of padding = 2.01562 bits"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SchemeError, match="do not divide head_dim 80"):
        bits(kivi2, head_dim=80)
    with pytest.raises(SchemeError, match="the model has 4 layers"):
        bits(fp16.with_(layers={7: kivi2}), layers=4)
    with pytest.raises(ShapeError, match="tokens: 0 is no positive integer"):
        bits(kivi2, tokens=0)
