"""What is refused, and in which words: place, fact, mend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvdsl.errors import SchemeError
from kvdsl.rules import layer_faults, refuse_for, shape_faults
from kvdsl.scheme import (
    ALL,
    Block,
    Float,
    Recent,
    Scale,
    Scheme,
    Sinks,
    Store,
    Uniform,
    per_channel,
    per_tensor,
    per_token,
)
from kvdsl.schemes import ALL as SHIPPED
from kvdsl.schemes import fp16, kivi2
from kvdsl.shape import Shape

TOKEN = per_token()


def uniform(code: object, **scale: object) -> Scheme:
    return Scheme(keys=Store(code, scale=per_token(**scale)), values=Store())  # type: ignore[arg-type]


def blocks(keys: Scale, recent: Recent | None = None) -> Scheme:
    return Scheme(keys=Store(Uniform(2), scale=keys), values=Store(), recent=recent)


# (what is built, the one sentence that refuses it)
FAULTY: list[tuple[Callable[[], Scheme], str]] = [
    (lambda: Scheme(), "keys: missing; write keys=Store(...) and values=Store(...), or both=Store(...)"),
    (
        lambda: Scheme(keys=Store()),
        "values: missing; write keys=Store(...) and values=Store(...), or both=Store(...)",
    ),
    (lambda: Scheme(keys=Store(), both=Store()), "both: given together with keys; write either both= or keys="),
    (
        lambda: Scheme(keys="fp16", values=Store()),  # type: ignore[arg-type]
        "keys: 'fp16' is a str, not a Store; write Store(Uniform(bits=4), scale=per_token())",
    ),
    (
        lambda: Scheme(keys=Store, values=Store()),  # type: ignore[arg-type]
        "keys: Store is the class itself, not a value of it; write Store(Uniform(bits=4), scale=per_token())",
    ),
    (
        lambda: Scheme(both=Store(Uniform(2))),
        "keys.scale: evenly spaced levels need a scale; say what shares one, as scale=per_token(channels=32)",
    ),
    (
        lambda: Scheme(both=Store(Uniform(2), scale=Block(1, 32))),  # type: ignore[arg-type]
        "keys.scale: Block(channels=32) is a Block, not a Scale; write scale=per_token(channels=32)",
    ),
    (
        lambda: Scheme(both=Store(Float(), scale=TOKEN)),
        "keys.scale: fp16 holds the number itself and takes no scale; leave scale out, or use Uniform(bits=4)",
    ),
    (
        lambda: Scheme(both=Store(Float("e8m0"))),  # type: ignore[arg-type]
        "keys.code.format: 'e8m0' is none of fp16, fp32, e4m3, e5m2, e2m1; use 'e5m2'",
    ),
    (lambda: uniform(Uniform()), "keys.code.bits: no bits; write Uniform(bits=4)"),
    (lambda: uniform(Uniform(levels=5)), "keys.code.bits: no bits; write Uniform(bits=3, levels=5)"),
    (
        lambda: uniform(Uniform(levels=3), range="signed_absmax"),
        "keys.code.levels: 3 levels have one in the middle, and signed_absmax on grid 'ends' needs an even number; "
        "use bits=2 and levels=2 or 4",
    ),
    (lambda: uniform(Uniform(True)), "keys.code.bits: True is no number of bits; use an int from 1 to 8"),
    (lambda: uniform(Uniform(4.0)), "keys.code.bits: 4.0 is a float, not an int; use 4"),  # type: ignore[arg-type]
    (lambda: uniform(Uniform("4")), "keys.code.bits: '4' is no number of bits; use an int from 1 to 8"),  # type: ignore[arg-type]
    (lambda: uniform(Uniform(10**9)), "keys.code.bits: 1000000000 bits are more than 8; use 8"),
    (lambda: uniform(Uniform(-1)), "keys.code.bits: -1 bits are fewer than 1; use an int from 1 to 8"),
    (
        lambda: uniform(Uniform(10**5000)),
        "keys.code.bits: <int of about 5000 digits> bits are more than 8; use 8",
    ),
    (
        lambda: uniform(Uniform(np.int64(4))),  # type: ignore[arg-type]
        f"keys.code.bits: {np.int64(4)!r} is a numpy.int64, not an int; use 4",
    ),
    (lambda: uniform(Uniform(float("nan"))), "keys.code.bits: nan is no number of bits; use an int from 1 to 8"),  # type: ignore[arg-type]
    (
        lambda: uniform(Uniform(2, levels=5)),
        "keys.code.levels: 5 levels do not fit 2 bits; use bits=3 or levels=4",
    ),
    (lambda: uniform(Uniform(2, levels=1)), "keys.code.levels: 1 levels are fewer than 2; use 2"),
    (
        lambda: uniform(Uniform(2, grid="cell")),  # type: ignore[arg-type]
        "keys.code.grid: 'cell' is none of ends, cells; use 'cells'",
    ),
    (
        lambda: uniform(Uniform(2, grid="cells", rounding="half_up")),
        "keys.code.rounding: the cell that a number lies in is its code, 'half_up' has nothing to round; "
        "leave rounding out, or use grid='ends'",
    ),
    (
        lambda: uniform(Uniform(2), range="min_max"),
        "keys.scale.range: 'min_max' is none of minmax, minmax_zero, absmax, signed_absmax, norm, absmean; "
        "use 'minmax'",
    ),
    (
        lambda: uniform(Uniform(2), clip=float("nan")),
        "keys.scale.clip: nan is not in (0, 4]; use 1.0 for the whole range, or less, as 0.9",
    ),
    (
        lambda: uniform(Uniform(2), clip=1.5),
        "keys.scale.clip: 1.5 times the range puts its ends where no number is; use 1.0 or less, or range='absmax'",
    ),
    (
        lambda: uniform(Uniform(2), clip=np.float64(0.5)),
        f"keys.scale.clip: {np.float64(0.5)!r} is a numpy.float64, not a float; use 0.5",
    ),
    (
        lambda: uniform(Uniform(1), range="absmax"),
        "keys.code.bits: 1 level cannot be 0 and both its sides, as absmax asks on grid 'ends'; "
        "use bits=2 or grid='cells'",
    ),
    (
        lambda: uniform(Uniform(2, levels=2), range="absmax"),
        "keys.code.levels: 2 levels cannot be 0 and both its sides, as absmax asks on grid 'ends'; "
        "use levels=3 and bits=2, or grid='cells'",
    ),
    (
        lambda: uniform(Uniform(2, levels=3, grid="cells"), range="absmax"),
        "keys.code.levels: 3 levels have one in the middle, and absmax on grid 'cells' needs an even number; "
        "use levels=2 or 4",
    ),
    (
        lambda: uniform(Uniform(4, levels=15), range="signed_absmax"),
        "keys.code.levels: 15 levels have one in the middle, and signed_absmax on grid 'ends' needs an even number; "
        "use levels=14 or 16",
    ),
    (
        lambda: uniform(Uniform(4, grid="cells"), range="signed_absmax"),
        "keys.code.grid: signed_absmax puts its extreme on a level, and grid 'cells' has none there; "
        "use grid='ends' or range='absmax'",
    ),
    (
        lambda: uniform(Uniform(4), range="absmax", zero="point"),
        "keys.scale.zero: absmax is centred on 0 and has no offset to store as 'point'; "
        "leave zero out, or use range='minmax'",
    ),
    (
        lambda: uniform(Uniform(4, rounding="floor"), zero="point"),
        "keys.code.rounding: rounded down over a scale that was rounded up, a block of one number beside its zero "
        "point decodes to 0; use rounding='even' or zero='min'",
    ),
    (
        lambda: uniform(Uniform(4, grid="cells"), zero="point"),
        "keys.scale.zero: an integer zero point lies on a level, and grid 'cells' puts 0 between two; "
        "use zero='min' or grid='ends'",
    ),
    (
        lambda: uniform(Uniform(4), zero="in_scale"),
        "keys.scale.zero: a zero point inside the scale needs the spare bits of fp32, not fp16; "
        "use dtype='fp32' or zero='point'",
    ),
    (
        lambda: uniform(Uniform(2), channels=1),
        "keys.scale.block: a block of one token and one channel codes nothing: lowest and highest are the value "
        "itself; use per_token(channels=32)",
    ),
    (
        lambda: uniform(Uniform(2), channels=32, heads=ALL),
        "keys.scale.block: a block over several heads takes all their channels; use channels=ALL",
    ),
    (
        lambda: uniform(Uniform(2), channels=0.5),
        "keys.scale.block.channels: 0.5 is a share, and only a count of channels is meant here; "
        "use an int from 1 to 256, or ALL",
    ),
    (
        lambda: blocks(per_channel()),
        "keys.scale: one scale over all tokens cannot be appended to; "
        "use when='calibrated', or a group such as tokens=64",
    ),
    (
        lambda: blocks(per_channel(tokens=32)),
        "keys.scale.block.tokens: a group of 32 tokens must wait until it is full; add recent=Recent(32)",
    ),
    (
        lambda: blocks(per_channel(tokens=48), Recent(128)),
        "keys.scale.block.tokens: a window of 128 tokens is no whole number of groups of 48; use Recent(144)",
    ),
    (
        lambda: blocks(per_channel(tokens=32), Recent(128, "rolling")),
        "keys.scale.block.tokens: a group of 32 tokens must wait until it is full, and a rolling window lets them go "
        "one by one; use Recent(128)",
    ),
    (
        lambda: blocks(per_channel(tokens=1024), Recent(1024)),
        "keys.scale.block.tokens: 1024 tokens are more than 512; use 512",
    ),
    (
        lambda: blocks(per_channel(tokens=509), Recent(509)),
        "keys.scale.block.tokens: groups of 509 tokens, words of 64 meet every 32576 tokens, a page holds 4096; "
        "use 512",
    ),
    (
        lambda: blocks(per_channel(tokens=64, when="calibrated"), Recent(64)),
        "keys.scale.block.tokens: a calibrated scale is one for all tokens, not one for every 64; "
        "use tokens=ALL or when='online'",
    ),
    (
        lambda: blocks(Scale(Block(ALL, ALL, 2), when="calibrated")),
        "keys.scale.block.heads: a calibrated scale has an entry for each kv head or one for all, not one for 2; "
        "use 1 or ALL",
    ),
    (
        lambda: blocks(per_tensor(zero="point", when="calibrated")),
        "keys.scale.zero: a calibrated offset costs no bytes a token, 'point' saves nothing; leave zero out",
    ),
    (
        lambda: fp16.with_(recent=Recent(0.1)),  # type: ignore[arg-type]
        "recent.tokens: 0.1 is a share, and only a count of tokens is meant here; use an int from 1 to 1048576",
    ),
    (
        lambda: fp16.with_(recent=Recent(0)),
        "recent.tokens: 0 tokens are fewer than 1; use an int from 1 to 1048576",
    ),
    (lambda: fp16.with_(recent=128), "recent: 128 is an int, not a Recent; write recent=Recent(128)"),
    (
        lambda: fp16.with_(sinks=Sinks(-4)),
        "sinks.tokens: -4 tokens are fewer than 1; use an int from 1 to 1048576",
    ),
    (lambda: fp16.with_(prefill="exakt"), "prefill: 'exakt' is none of exact, stored; use 'exact'"),
    (lambda: fp16.with_(source=3), 'source: 3 is an int, not a str; write source="arXiv 2402.02750, section 3"'),
    (
        lambda: fp16.with_(source="\ud800"),
        "source: '\\ud800' holds half a surrogate pair, which no file can; remove it",
    ),
    (lambda: fp16.with_(layers=3), "layers: 3 is no table of layers; write layers={0: fp16, range(1, 4): kivi4}"),
    (
        lambda: fp16.with_(layers={"0": kivi2}),
        "layers['0']: '0' is no layer index; use an int, as 0, or -1 for the last layer",
    ),
    (lambda: fp16.with_(layers={0: "kivi2"}), "layers[0]: 'kivi2' is a str, not a Scheme; write layers={0: fp16}"),
    (
        lambda: fp16.with_(layers=((0, 1, 2),)),
        "layers: ((0, 1, 2),) is no table of layers; write layers={0: fp16, range(1, 4): kivi4}",
    ),
    (
        lambda: fp16.with_(layers={1: kivi2, (0, "b"): kivi2, "a": kivi2, range(10**9): 3}),
        "layers[(0, 'b')]: 'b' is no layer index; use an int, as 0, or -1 for the last layer\n"
        "layers['a']: 'a' is no layer index; use an int, as 0, or -1 for the last layer\n"
        "layers[range(0, 1000000000)]: range(0, 1000000000) is no layer index; use an int, as 0, or -1 for the last "
        "layer\nlayers[range(0, 1000000000)]: 3 is an int, not a Scheme; write layers={0: fp16}",
    ),
    (
        lambda: fp16.with_(layers={range(0, 4): kivi2, 3: kivi2}),
        "layers[3]: layer 3 is listed twice; name every layer once",
    ),
    (
        lambda: fp16.with_(layers={0: kivi2.with_(layers={1: fp16})}),
        "layers[0]: a layer's scheme has layers of its own; flatten the table",
    ),
]


@pytest.mark.parametrize(("build", "sentence"), FAULTY, ids=[sentence.partition(";")[0] for _, sentence in FAULTY])
def test_a_faulty_spec_is_refused_in_these_words(build: Callable[[], Scheme], sentence: str) -> None:
    with pytest.raises(SchemeError) as caught:
        build()
    assert str(caught.value) == sentence


def test_three_mistakes_give_three_faults() -> None:
    with pytest.raises(SchemeError) as caught:
        Scheme(
            keys=Store(Uniform(2, levels=5), scale=per_token(channels=32, zero="in_scale")),
            values=Store(Uniform(9), scale=per_token(channels=32)),
        )
    assert [fault.place for fault in caught.value.faults] == ["values.code.bits", "keys.code.levels", "keys.scale.zero"]


def test_a_wrong_type_hides_no_other_mistake() -> None:
    with pytest.raises(SchemeError) as caught:
        Scheme(both=Store(Uniform(True), scale=per_channel(tokens=32, clip="all")))
    places = [fault.place for fault in caught.value.faults]
    assert places == ["keys.code.bits", "keys.scale.clip", "keys.scale.block.tokens"]


SHAPES = [
    (
        uniform(Uniform(2), channels=48),
        Shape(128),
        "keys.scale.block.channels: groups of 48 channels do not divide head_dim 128; use 16 or ALL",
    ),
    (
        uniform(Uniform(2), channels=3),
        Shape(128),
        "keys.scale.block.channels: groups of 3 channels do not divide head_dim 128; use ALL",
    ),
    (
        uniform(Uniform(2), heads=3),
        Shape(128),
        "keys.scale.block.heads: 3 heads do not divide 8 kv heads; use 1, 2, 4, 8 or ALL",
    ),
]


@pytest.mark.parametrize(("scheme", "shape", "sentence"), SHAPES)
def test_a_spec_that_does_not_fit_a_shape_is_refused_in_these_words(
    scheme: Scheme, shape: Shape, sentence: str
) -> None:
    with pytest.raises(SchemeError) as caught:
        refuse_for(scheme, shape)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scheme_fits_the_usual_shapes(name: str) -> None:
    own = SHIPPED[name].head_dim
    assert not any(shape_faults(SHIPPED[name], Shape(head_dim)) for head_dim in ((own,) if own else (128, 256)))


def test_the_layer_table_is_checked_against_the_number_of_layers() -> None:
    scheme = fp16.with_(layers={40: kivi2, -1: kivi2, 31: kivi2})
    assert list(map(str, layer_faults(scheme, 32))) == [
        "layers[31]: of 32 layers this is layer 31, which is listed as -1, too; name every layer once",
        "layers[40]: the model has 32 layers; use an index from -32 to 31",
    ]
    assert not layer_faults(fp16.with_(layers={0: kivi2, -1: kivi2}), 32)
