"""How many bits a number of the cache takes, counted from the spec alone and exact to the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction

from .codes import SLOT_TOKENS, coupled, in_trits, trit_bytes, width
from .errors import SchemeError, ShapeError
from .rules import layer_faults, refuse_for
from .scheme import (
    ALL,
    SIDES,
    Additive,
    Band,
    Bands,
    Chosen,
    Codebook,
    Eigenbasis,
    LowRank,
    Scale,
    Scheme,
    Side,
    Sparse,
    Store,
    TopChannels,
    Vectors,
)
from .segments import segments
from .shape import USUAL, Shape
from .tier_shares import shares
from .tiers import Saliency
from .window import tile_tokens, windows

ALIGN = 16  # bytes: every section of a page begins at a multiple
EXACT = 16  # bits of a number that a window or a sink keeps as it came
PLACE = 8  # bits that say where a single number stands: which channel of a token, or which token of a block
POSITION = 32  # bits that say where a token of a tier stood, and of each sum that is carried on
CONSTANT = 4  # bytes of a calibrated number: float32, once a layer
WIDTH = {"fp32": 32, "fp16": 16, "bf16": 16, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class SideBits:
    """Bits per element of one side: four parts that add up to `total`, and the `exact` share of tokens behind `window`.

    code: the codes; metadata: scales and offsets; padding: what aligning the sections of a page adds; window: exact
    tokens, at 16 bits.  Without a number of tokens the window is left out (as if the sequence never ended).
    """

    code: float
    metadata: float
    padding: float
    window: float
    exact: float

    @property
    def total(self) -> float:
        return self.code + self.metadata + self.padding + self.window


@dataclass(frozen=True)
class Bits:
    """Bits per element of a scheme.  `constants`: bytes a layer of calibrated numbers, the same for every length."""

    sides: tuple[SideBits, SideBits]
    constants: float
    formulas: tuple[str, str]

    @property
    def keys(self) -> float:
        return self.sides[0].total

    @property
    def values(self) -> float:
        return self.sides[1].total

    @property
    def mean(self) -> float:
        return (self.keys + self.values) / 2

    @property
    def code(self) -> float:
        return (self.sides[0].code + self.sides[1].code) / 2

    @property
    def metadata(self) -> float:
        return (self.sides[0].metadata + self.sides[1].metadata) / 2

    @property
    def padding(self) -> float:
        return (self.sides[0].padding + self.sides[1].padding) / 2

    @property
    def window(self) -> float:
        return (self.sides[0].window + self.sides[1].window) / 2

    def side(self, name: Side) -> SideBits:
        """The parts of one side."""
        return self.sides[SIDES.index(name)]

    def formula(self, side: Side) -> str:
        """A packed number of this side in words, as `2 + (16 + 16)/32 = 3 bits`; the layer table does not enter."""
        return self.formulas[SIDES.index(side)]


def bits(
    scheme: Scheme, head_dim: int | None = None, kv_heads: int = 8, tokens: int | None = None, layers: int | None = None
) -> Bits:
    """What a scheme costs at a shape: per side code, metadata, padding and window bits per element.

    `head_dim` None: the scheme's own, else 128.  `tokens`: count the window and the sinks of a sequence of this length.
    `layers`: the mean over a model of so many layers, by the scheme's layer table.  Raises SchemeError for a scheme
    that does not fit the shape or the layers, and ShapeError for a shape that is none.
    """
    for name, value in (("tokens", tokens), ("layers", layers)):
        if value is not None and (type(value) is not int or value < 1):
            raise ShapeError(f"{name}: {value!r} is no positive integer")
    shape = Shape(head_dim or scheme.head_dim or USUAL, kv_heads)
    if layers is not None and (found := layer_faults(scheme, layers)):
        raise SchemeError(found)
    several = [scheme] if layers is None else [scheme.for_layer(i, layers) for i in range(layers)]
    seen = dict[str, tuple[tuple[SideBits, SideBits], int]]()
    for one in several:
        if one.hash not in seen:
            refuse_for(one, shape)
            seen[one.hash] = _layer(one, shape, tokens)
    counted = [seen[one.hash] for one in several]
    keys, values = (_mean([pair[i] for pair, _ in counted]) for i in range(2))
    constants = sum(constant for _, constant in counted) / len(counted)
    formulas = tuple(_formula(scheme, side, shape) for side in SIDES)
    return Bits((keys, values), constants, (formulas[0], formulas[1]))


def page_tokens(scheme: Scheme) -> int:
    """Tokens of a page of a scheme without tiers: whole words and whole blocks of both sides."""
    return math.lcm(tile_tokens(scheme), *(window.block for window in windows(scheme).values()))


def page_parts(scheme: Scheme, shape: Shape) -> dict[Side, dict[str, Fraction]]:
    """Of a scheme without tiers, bits per packed element of each side, exact: code, metadata, index, padding.

    index: what says where single numbers and chosen channels stand, which `bits` counts as metadata.  Of a page of
    `page_tokens` tokens they are all of its bytes.
    """
    tokens, found = page_tokens(scheme), dict[Side, dict[str, Fraction]]()
    for side in SIDES:
        code, metadata, padding = _of_side(scheme, side, shape)
        index = sum((_index(store, shape, tokens, side) for store in _kept(scheme, side)), Fraction(0))
        found[side] = {"code": code, "metadata": metadata - index, "index": index, "padding": padding}
    return found


def _index(store: Store, shape: Shape, tokens: int, side: Side) -> Fraction:
    """Of the metadata bits per element, those that are places."""
    if isinstance(store.code, Sparse):
        return Fraction(PLACE * store.code.slots, shape.head_dim if side == "keys" else SLOT_TOKENS)
    if isinstance(store.code, Chosen):
        return _choice(store.code.choice, shape, tokens)[0]
    if isinstance(store.code, LowRank) or store.chosen is None:
        return Fraction(0)
    return _choice(store.chosen, shape, tokens)[0]


def _layer(scheme: Scheme, shape: Shape, tokens: int | None) -> tuple[tuple[SideBits, SideBits], int]:
    """Bits of both sides, the mean over groups of heads by their number, and bytes of constants."""
    pairs, constants = list[tuple[SideBits, SideBits]](), 0
    for heads, one in scheme.by_heads(shape.kv_heads):
        group = shape.of_heads(len(heads))
        stores = [plain.side(side) for plain in _plain(one) for side in SIDES]
        pairs += [_sides(one, group, tokens)] * len(heads)
        constants += sum(_constants(store, group) for store in stores)
    if len(set(pairs)) == 1:
        return pairs[0], constants
    keys, values = (_mean([pair[i] for pair in pairs]) for i in range(2))
    return (keys, values), constants


def _plain(scheme: Scheme) -> list[Scheme]:
    """The scheme, or what its tiers store."""
    return [one.scheme for one in segments(scheme) if one.scheme] if scheme.routed else [scheme]


def _mean(parts: list[SideBits]) -> SideBits:
    sums = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(SideBits)}
    return SideBits(**{name: total / len(parts) for name, total in sums.items()})


def _sides(scheme: Scheme, shape: Shape, tokens: int | None) -> tuple[SideBits, SideBits]:
    keys, values = (_side(scheme, side, shape, tokens) for side in SIDES)
    return keys, values


def _side(scheme: Scheme, side: Side, shape: Shape, tokens: int | None) -> SideBits:
    if scheme.routed:
        return _of_tiers(scheme, side, shape, tokens)
    code, metadata, padding = _of_side(scheme, side, shape)
    exact = 0.0 if tokens is None else 1 - windows(scheme)[side].packed(tokens) / tokens
    packed, rows = 1 - exact, EXACT * exact * scheme.dim(side, shape.head_dim) / shape.head_dim
    return SideBits(float(code) * packed, float(metadata) * packed, float(padding) * packed, rows, exact)


def _of_tiers(scheme: Scheme, side: Side, shape: Shape, tokens: int | None) -> SideBits:
    """The mean over tiers, each weighed by its share of the tokens, those that are dropped at 0 bits; and where kept
    tokens stood, and the sums that are carried on, half of it for each side."""
    parts, rest = shares(scheme, tokens)
    code = metadata = padding = kept = 0.0
    for part, one in zip(parts, segments(scheme), strict=True):
        if one.scheme is None:
            continue
        of_code, of_scales, of_padding = map(float, _of_side(one.scheme, side, shape))
        code, metadata, padding = code + part * of_code, metadata + part * of_scales, padding + part * of_padding
        kept += part
        if (measured := one.of(side)) is not None and tokens is not None and part:
            metadata += EXACT * (2 if measured.by == "range" else 1) / tokens
        if one.feedback is not None and side == "keys" and tokens is not None and part:
            metadata += WIDTH["fp32"] * one.feedback.rank / tokens
    carried = scheme.router.carried if isinstance(scheme.router, Saliency) else 0
    before = any(one.scheme is not None and one.scheme.keys.rope is not None for one in segments(scheme))
    kept = 0.0 if scheme.router is None and not before else kept
    metadata += kept * POSITION * (1 + carried) / (2 * shape.head_dim)
    return SideBits(code, metadata, padding, EXACT * rest, rest)


def _of_side(scheme: Scheme, side: Side, shape: Shape) -> tuple[Fraction, Fraction, Fraction]:
    """(code, metadata, padding) bits per element of a store and of what codes what is left, together."""
    tokens, none = page_tokens(scheme), (Fraction(0),) * 3
    parts = zip(none, *(_stored(store, shape, tokens, side) for store in _kept(scheme, side)), strict=True)
    code, metadata, padding = (sum(part, Fraction(0)) for part in parts)
    return code, metadata, padding


def _kept(scheme: Scheme, side: Side) -> tuple[Store, ...]:
    """What a page holds of a side: of shared values nothing."""
    return () if side == "values" and scheme.shared else scheme.side(side).terms


def _stored(store: Store, shape: Shape, tokens: int, side: Side) -> tuple[Fraction, Fraction, Fraction]:
    """(code, metadata, padding) bits per element, counted over the sections of one page."""
    if isinstance(store.code, Sparse):
        kept = Fraction(store.code.slots, shape.head_dim if side == "keys" else SLOT_TOKENS)
        places = tokens * shape.head_dim * kept * PLACE / 8  # bytes of a head
        padding = Fraction(8 * (-places % ALIGN), tokens * shape.head_dim)
        return EXACT * kept, PLACE * kept, padding
    if isinstance(store.code, LowRank):
        numbers = EXACT * store.code.rank  # bits of a token's, and of all vectors in one channel
        return Fraction(numbers, shape.head_dim), Fraction(numbers, store.code.tokens), Fraction(0)
    if isinstance(store.code, Chosen):
        numbers = tokens * store.coded(shape.head_dim)
        padding = Fraction(8 * (-numbers * store.code.bits // 8 % ALIGN), tokens * shape.head_dim)
        which, more = _choice(store.code.choice, shape, tokens)
        return Fraction(store.code.bits * numbers, tokens * shape.head_dim), which, padding + more
    elements = tokens * shape.head_dim * shape.kv_heads
    section, copies = 0, 1
    if (scale := _online(store)) is not None:
        heads = _size(scale.block.heads, shape.kv_heads)
        numbers = tokens * store.measured(shape.head_dim) * heads
        section = numbers // _block(store, scale, shape) * sum(_widths(scale)) // 8
        copies = shape.kv_heads // heads
        if heads > 1:  # shared by heads: one section of the page's tail, all copies in it
            section, copies = section * copies, 1
    padded = -(-section // ALIGN) * ALIGN
    metadata, padding = (Fraction(8 * size * copies, elements) for size in (section, padded - section))
    if store.balance is not None:  # a factor a token, or a channel and tile
        count = tokens if store.of_tokens else tokens // store.balance.tokens * shape.head_dim
        metadata += Fraction(EXACT * count, tokens * shape.head_dim)
        padding += Fraction(8 * (-2 * count % ALIGN), tokens * shape.head_dim)
    if store.chosen is not None:
        which, more = _choice(store.chosen, shape, tokens)
        metadata, padding = metadata + which, padding + more
    if isinstance(store.code, Additive):  # rows of whole bytes
        code = store.code.of(shape.head_dim)
        padding += Fraction(8 * code.row - code.bits * code.codes, shape.head_dim)
    return _code(store, store.coded(shape.head_dim)) / shape.head_dim, metadata, padding


def _choice(choice: TopChannels, shape: Shape, tokens: int) -> tuple[Fraction, Fraction]:
    """Bits per element that tell which channels are chosen, a byte each, and of their padding."""
    size = tokens // choice.tokens * choice.count(shape.head_dim)  # bytes of a head
    return Fraction(8 * size, tokens * shape.head_dim), Fraction(8 * (-size % ALIGN), tokens * shape.head_dim)


def _code(store: Store, numbers: int) -> Fraction:
    """Bits of the codes of `numbers` numbers, a row of a page."""
    if in_trits(store.code):
        return Fraction(8 * trit_bytes(numbers))
    bits = width(store.code)
    assert bits is not None
    if isinstance(store.code, Additive):
        return Fraction(bits * store.code.of(numbers).codes)
    return Fraction(bits * numbers, coupled(store.code))


def _online(store: Store) -> Scale | None:
    return store.measure if store.measure is not None and store.measure.when == "online" else None


def _size(count: object, whole: int) -> int:
    return count if isinstance(count, int) else whole


def _block(store: Store, scale: Scale, shape: Shape) -> int:
    """Numbers that share an online scale."""
    block = scale.block
    assert isinstance(block.tokens, int)
    return block.tokens * _size(block.channels, store.measured(shape.head_dim)) * _size(block.heads, shape.kv_heads)


def _widths(scale: Scale) -> tuple[int, ...]:
    """Bits of what is stored for one block: the scale, and its offset where there is one beside it."""
    offset = scale.range in ("minmax", "minmax_zero") and not scale.zero_inside
    return (WIDTH[scale.dtype],) * (1 + offset)


def _constants(store: Store, shape: Shape) -> int:
    """Bytes a layer of calibrated numbers: a scale, (kv heads or 1) x (groups of channels or 1), offsets too; a second
    level, (kv heads or 1); the levels of a table, those that codes are decoded at if they are others; vectors, in fp16;
    the matrices of a basis."""
    scale, count = store.measure, 0
    bases = (part for part in store.own.linear if isinstance(part, Eigenbasis))
    square = store.own.given(shape.head_dim) ** 2
    count += sum((shape.kv_heads if part.per == "head" else 1) * part.matrices * square for part in bases)
    if store.split is not None:
        count += shape.kv_heads * (shape.head_dim - store.own.given(shape.head_dim))
    if isinstance(store.code, Codebook) and store.code.levels == "calibrated":
        count += 2 ** (width(store.code) or 0) * (1 if store.code.match is None else 2)
    if isinstance(store.code, Vectors):  # in float16
        count += shape.kv_heads * shape.head_dim * 2**store.code.bits // 2
    if isinstance(store.code, Additive):  # the same
        count += shape.kv_heads * shape.head_dim * store.code.of(shape.head_dim).count * 2**store.code.bits // 2
    if scale is not None and scale.when == "calibrated":
        channels = store.own.width(shape.head_dim)
        groups = channels // _size(scale.block.channels, channels)
        count += _heads(scale, shape) * groups * len(_widths(scale))
    if scale is not None and scale.scale is not None:
        count += _heads(scale.scale, shape)
    return CONSTANT * count


def _heads(scale: Scale, shape: Shape) -> int:
    """Kv heads that a calibrated scale has a number of its own for, or one for all."""
    return 1 if scale.block.heads is ALL else shape.kv_heads


def _formula(scheme: Scheme, side: Side, shape: Shape) -> str:
    """Bits of a packed number in words; of several stores, or tiers, one behind the other, then their sum."""
    if scheme.routed:
        parts, _ = shares(scheme, None)
        told = [_formula(one.scheme, side, shape) if one.scheme else "0 bits" for one in segments(scheme)]
        each = [f"{part:.3g} x ({text})" for part, text in zip(parts, told, strict=True)]
        return " + ".join(each) + f" and places = {_of_tiers(scheme, side, shape, None).total:g} bits"
    tokens, store = page_tokens(scheme), scheme.side(side)
    if side == "values" and scheme.shared:
        return f"0 bits, they are the first {scheme.dim(side, shape.head_dim)} channels of the keys"
    first, *others = (_formula_of(term, shape, tokens, side) for term in store.terms)
    names = ["angles" if store.levels > 1 else "what is left"] * len(others)
    if isinstance(store.code, Bands) and store.code.channels:
        names = ["the next"] * len(others)
    if store.outliers is not None:
        names[0] = "single numbers" if isinstance(store.outliers, Sparse) else "outlier channels"
    behind = "".join(f"; of {name} {text}" for name, text in zip(names, others, strict=True))
    return first + (f"{behind}; together {float(sum(_of_side(scheme, side, shape))):g} bits" if others else "")


def _formula_of(store: Store, shape: Shape, tokens: int, side: Side) -> str:
    code, metadata, padding = _stored(store, shape, tokens, side)
    total = float(code + metadata + padding)
    stretch = isinstance(store, Band) and not store.polar
    channels = store.coded(shape.head_dim) if stretch else store.width(shape.head_dim)
    if isinstance(store.code, LowRank):
        rank = f"{EXACT} x {store.code.rank}"
        return f"{rank}/{shape.head_dim} + {rank}/{store.code.tokens} = {total:g} bits"
    if isinstance(store.code, Sparse):
        lane = shape.head_dim if side == "keys" else SLOT_TOKENS
        padded = f" + {float(padding):g} of padding" if padding else ""
        return f"{store.code.slots} x ({EXACT} + {PLACE})/{lane}{padded} = {total:g} bits"
    if isinstance(store.code, Chosen):
        count, told = store.coded(shape.head_dim), f" + {float(padding):g} of padding" if padding else ""
        return f"{count}/{shape.head_dim} x ({store.code.bits} + {PLACE}/{store.code.tokens}){told} = {total:g} bits"
    part = f"{channels}/{shape.head_dim} x " if store.pick or store.short or stretch else ""
    code = code * shape.head_dim / channels
    if (scale := _online(store)) is None:
        return f"{part}{float(code):g} = {total:g} bits" if part else f"{float(code):g} bits"
    widths = _widths(scale)
    share = f"({' + '.join(map(str, widths))})" if len(widths) > 1 else str(widths[0])
    padded = f" + {float(padding):g} of padding" if padding else ""
    number = f"{float(code):g} + {share}/{_block(store, scale, shape)}"
    if store.balance is not None:
        padded = f" + {EXACT}/{shape.head_dim if store.of_tokens else store.balance.tokens}{padded}"
    if (top := store.chosen) is not None:
        padded = f" + {PLACE} x {top.count(shape.head_dim)}/({shape.head_dim} x {top.tokens}){padded}"
    return f"{f'{part}({number})' if part else number}{padded} = {total:g} bits"
