"""Where every bit of a page stands: codes in planes of words, metadata beside them, a layer's kv heads in one page.

A page holds `page_tokens` tokens.  It is one blob a kv head, then the metadata that several heads share.  Codes are cut
into streams of 8, 4, 2 and 1 bits, the widest holding the top bits, so that no width is padded to a power of two.  A
stream is made of planes: plane j holds channels [j*width, (j+1)*width) at one bit offset of its words, so that one AND
takes a whole plane out of a tile of words.  Codes of three levels are digits instead of bits, five in a byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

from kvdsl.codes import SLOT_TOKENS, coupled, in_trits, trit_bytes
from kvdsl.codes import width as code_bits
from kvdsl.scheme import ALL, SIDES, Additive, Band, Chosen, Float, LowRank, MetaFormat, Scheme, Sparse, Store
from kvdsl.shape import Shape
from kvdsl.window import tile_tokens, token_block, waiting

from .sections import Across, Beside, Channels, Factors, Slots, Span
from .tiling import NARROWEST, PAIR

ALIGN = 16  # bytes: what one asynchronous copy moves
MOST_PLANES = 16  # that groups of channels may ask for: a product for each of more takes minutes to compile
FACTORED = 32  # lanes of a plane that vectors of low rank are read in: wider ones fill the registers


@dataclass(frozen=True)
class Place:
    """One plane of one stream: word tile `tile` of a row, byte `byte` of each word, bits from `bit` of that byte (of a
    stream of digits: digit `bit`, the highest being digit 0)."""

    plane: int
    tile: int
    byte: int
    bit: int


@dataclass(frozen=True)
class Stream:
    """The codes' bits [shift, shift + width), packed.  `offset` is in bytes from the head blob's start.

    single: a row of words is one token.  paired: a row is tokens t and t + 32 of a block of 64, low and high bytes.
    digits: five ternary digits a byte, those of channels x, x + row_words, x + 2*row_words, ... in byte x of a row.
    """

    width: int
    shift: int
    paired: bool
    offset: int
    row_words: int
    rows: int
    places: tuple[Place, ...]
    digits: bool = False

    @property
    def size(self) -> int:
        return 2 * self.rows * self.row_words

    @property
    def tiles(self) -> int:
        """Word tiles of a row, each one plane wide."""
        return 1 + max(place.tile for place in self.places)

    def row(self, token: int) -> int:
        """The row of a token of the page."""
        return token // (2 * PAIR) * PAIR + token % PAIR if self.paired else token

    def address(self, token: int, channel: int, plane_width: int) -> tuple[int, int]:
        """(byte from the section's start, bit or digit in that byte) of one code."""
        half, word = token % (2 * PAIR) // PAIR, self.row(token) * self.row_words + channel % plane_width
        if self.digits:
            return 2 * word + half, channel // plane_width
        place = self.places[channel // plane_width]
        return 2 * (word + place.tile * plane_width) + (half if self.paired else place.byte), place.bit


MetaKind = Literal["byte", "bytes", "half", "halves", "word", "words"]
META_BYTES: dict[MetaKind, int] = {"byte": 1, "bytes": 2, "half": 2, "halves": 4, "word": 4, "words": 8}


@dataclass(frozen=True)
class Meta:
    """Stored scales (and offsets) of a side.  `offset` in bytes from the blob's start, or from the page's if shared.

    kind: byte, half, word = a scale of 8, 16, 32 bits; bytes, halves = scale and offset as low and high half of a word
    of 16 or 32 bits; words = all 32-bit scales, then all 32-bit offsets.  Entry (block, group) is `block *
    block_stride + group * group_stride`.
    """

    kind: MetaKind
    offset: int
    shared: bool
    heads: int
    head_groups: int
    tokens: int
    channels: int
    blocks: int
    groups: int
    block_stride: int
    group_stride: int

    @property
    def entries(self) -> int:
        return self.blocks * self.groups

    @property
    def total(self) -> int:
        """Entries of the section: those of all head groups where it is shared, else of one head."""
        return self.entries * (self.head_groups if self.shared else 1)

    @property
    def size(self) -> int:
        """Bytes of the section."""
        return self.total * META_BYTES[self.kind]

    @property
    def element(self) -> int:
        """Bytes of what one load reads."""
        return 4 if self.kind == "words" else META_BYTES[self.kind]


@dataclass(frozen=True)
class SideLayout:
    """One side of a page, `width` numbers a token.  `streams` is empty where the numbers themselves are stored
    (`float_offset`), vectors of low rank (`factors`), single numbers (`slots`), or those of chosen channels (`beside`),
    which `channels` tells.  Planes have `plane_width` lanes; of digits the last may have fewer, and one that crosses
    groups of channels counts as several.  Of `coupled` channels that share a code each has planes of its own, one
    behind the other, which are read from the same words.  `row`: bytes of a token's codes, of which every channel is a
    sum; the stream is of bytes then, and planes are of channels alone.  `rest`: where the side's next term stands."""

    width: int
    streams: tuple[Stream, ...]
    plane_width: int
    spans: tuple[Span, ...]
    meta: Meta | None
    float_offset: int = 0
    factors: Factors | None = None
    slots: Slots | None = None
    beside: Beside | None = None
    channels: Channels | None = None
    across: Across | None = None
    coupled: int = 1
    row: int = 0
    rest: SideLayout | None = None

    @property
    def terms(self) -> tuple[SideLayout, ...]:
        """This and those behind it, as `Store.terms`."""
        return (self, *(self.rest.terms if self.rest else ()))

    @cached_property
    def rowwise(self) -> bool:
        """Tokens, or blocks of them, have bytes of their own: no word and no row of numbers is of several."""
        others = (term.factors or term.slots or term.beside or term.channels or term.across for term in self.terms)
        return not any(others) and not any(stream.paired for term in self.terms for stream in term.streams)

    @property
    def planes(self) -> int:
        return len(self.spans)

    @property
    def codes(self) -> int:
        """Codes of a token, of sums their bytes."""
        return self.row or self.width // self.coupled

    @property
    def code_width(self) -> int:
        """Lanes of a plane of codes."""
        return self.streams[0].row_words if self.row else self.plane_width

    @property
    def planar(self) -> tuple[Stream, ...]:
        """The streams that planes of channels are taken from."""
        return () if self.row else self.streams

    def place(self, stream: Stream, plane: int) -> Place:
        """Where the codes of a plane stand in a stream."""
        return stream.places[plane // self.coupled]

    @property
    def digits(self) -> bool:
        return any(stream.digits for stream in self.streams)

    @property
    def paired(self) -> bool:
        return any(stream.paired for stream in self.streams)


@dataclass(frozen=True)
class Layout:
    """A page: sizes in bytes.  `shared`: what is told of values stands in the keys' own sections."""

    head_dim: int
    kv_heads: int
    page_tokens: int
    head_bytes: int
    page_bytes: int
    keys: SideLayout
    values: SideLayout
    shared: bool = False

    def side(self, name: str) -> SideLayout:
        return self.keys if name == "keys" else self.values


def aligned(size: int) -> int:
    """The next multiple of 16 bytes."""
    return -(-size // ALIGN) * ALIGN


def widths(bits: int) -> tuple[int, ...]:
    """The stream widths of a code, widest first: 3 -> (2, 1), 7 -> (4, 2, 1)."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def _natural(width: int, codes: int, least: int = NARROWEST) -> tuple[bool, int]:
    """(paired, plane width) of a stream of so many codes a token on its own; planes below `least` hold two tokens."""
    if codes * width % 16 == 0 and codes * width // 16 >= least:
        return False, codes * width // 16
    return True, codes * width // 8


def _least(store: Store) -> int:
    """Lanes of planes that one token fills: where channels share codes each has planes of its own, so that they would
    be many narrow ones, whose operands fill the registers."""
    return 2 * NARROWEST if coupled(store.code) > 1 else NARROWEST


def _groups(store: Store) -> int | None:
    """Channels that share an online scale of single tokens; None where there is no such thing, or all share it."""
    scale = store.measure
    if scale is None or scale.when == "calibrated" or scale.block.tokens != 1:
        return None
    return scale.block.channels if isinstance(scale.block.channels, int) else None


def _spans(store: Store, head_dim: int, width: int) -> tuple[Span, ...]:
    """The planes, in order."""
    if (step := coupled(store.code)) > 1:
        whole = range(0, head_dim, width * step)
        return tuple(Span(start + i, 0, width, step) for start in whole for i in range(step))
    spans = []
    for start in range(0, head_dim, width):
        end = min(start + width, head_dim)
        group = _groups(store) if in_trits(store.code) else None
        cuts = [start, end]
        if group is not None and group >= NARROWEST:  # smaller groups are decoded one by one
            cuts[1:1] = range(start // group * group + group, end, group)
        spans += [Span(start, low - start, high - start) for low, high in zip(cuts, cuts[1:], strict=False)]
    return tuple(spans)


def plane_width(store: Store, head_dim: int) -> int:
    """Channels a plane, or codes of several, common to all streams of a side; it divides a per-token group of channels
    where that can be, and half of a vector in polar coordinates: radius and angle of a pair stand in the same lane of
    two planes."""
    width = _common_width(store, head_dim)
    while store.polar and not isinstance(store, Band) and head_dim // 2 % width:
        width //= 2
    return width


def _common_width(store: Store, head_dim: int) -> int:
    if isinstance(store.code, (Additive, LowRank)) or isinstance(store.code, Float) and store.code.plain:
        return min(FACTORED if isinstance(store.code, LowRank) else 64, head_dim & -head_dim)
    if isinstance(store.code, Chosen):  # few: one plane
        return head_dim
    if isinstance(store.code, Sparse):  # elementwise sums: the wider the fewer moves between registers
        return head_dim & -head_dim
    if in_trits(store.code):
        return trit_bytes(head_dim)
    head_dim //= coupled(store.code)
    width = min(_natural(w, head_dim, _least(store))[1] for w in widths(code_bits(store.code) or 0))
    group, narrow = _groups(store), width
    if group is None:
        return width
    while group % narrow and narrow % 2 == 0 and narrow // 2 >= NARROWEST:
        narrow //= 2
    return width if group % narrow or head_dim // narrow > MOST_PLANES else narrow


def _streams(
    bits: int, head_dim: int, width: int, tokens: int, offset: int, least: int = NARROWEST
) -> tuple[tuple[Stream, ...], int]:
    streams, shift = [], bits
    for stream_width in widths(bits):
        shift -= stream_width
        paired, _ = _natural(stream_width, head_dim, least)
        per_byte = 8 // stream_width
        per_tile = per_byte if paired else 2 * per_byte
        places = tuple(
            Place(j, j // per_tile, 0 if paired else j % per_tile // per_byte, j % per_byte * stream_width)
            for j in range(head_dim // width)
        )
        row_words = head_dim * stream_width // (8 if paired else 16)
        stream = Stream(stream_width, shift, paired, offset, row_words, tokens // 2 if paired else tokens, places)
        streams.append(stream)
        offset = aligned(offset + stream.size)
    return tuple(streams), offset


def _meta(store: Store, head_dim: int, kv_heads: int, tokens: int) -> Meta | None:
    scale = store.measure
    if scale is None or scale.when == "calibrated":
        return None
    block = scale.block
    channels = head_dim if block.channels is ALL else block.channels
    heads = kv_heads if block.heads is ALL else block.heads
    span = token_block(store)
    assert isinstance(channels, int) and isinstance(heads, int)
    blocks, groups = tokens // span, head_dim // channels
    beside = scale.range in ("minmax", "minmax_zero") and not scale.zero_inside
    kinds: dict[MetaFormat, MetaKind] = {"fp32": "word", "fp16": "half", "bf16": "half", "e4m3": "byte", "e8m0": "byte"}
    pairs: dict[MetaKind, MetaKind] = {"word": "words", "half": "halves", "byte": "bytes"}
    kind = pairs[kinds[scale.dtype]] if beside else kinds[scale.dtype]
    strides = (1, blocks) if span == 1 else (groups, 1)
    return Meta(kind, 0, heads > 1, heads, kv_heads // heads, span, channels, blocks, groups, *strides)


def _digit_stream(spans: tuple[Span, ...], row: int, tokens: int, offset: int) -> tuple[tuple[Stream, ...], int]:
    places = tuple(Place(j, 0, 0, span.start // row) for j, span in enumerate(spans))
    stream = Stream(2, 0, True, offset, row, tokens // 2, places, digits=True)
    return (stream,), aligned(offset + stream.size)


@cache
def lay_out(scheme: Scheme, shape: Shape) -> Layout:
    """The page of a scheme at a shape: sections in the order key codes, value codes, key metadata, value metadata, what
    is of what a store left behind its own, and stretches one behind the other."""
    held = SIDES[:1] if scheme.shared else SIDES
    stores = {(side, depth): store for side in held for depth, store in enumerate(scheme.side(side).terms)}
    dims = {at: store.coded(shape.head_dim) for at, store in stores.items()}
    tokens = math.lcm(tile_tokens(scheme), *map(waiting, stores.values()))
    offset, codes = 0, {}
    for at, store in stores.items():
        dim, width = dims[at], plane_width(store, dims[at])
        spans = _spans(store, dim, width)
        if isinstance(store.code, Float) and store.code.plain:
            codes[at] = SideLayout(dim, (), width, spans, None, offset)
            offset = aligned(offset + tokens * dim * (4 if store.code.format == "fp32" else 2))
        elif isinstance(store.code, LowRank):
            factors = Factors(store.code.rank, store.code.tokens, tokens // store.code.tokens, offset)
            codes[at] = SideLayout(dim, (), width, spans, None, factors=factors)
            offset = aligned(offset + 2 * tokens * store.code.rank)
        elif isinstance(store.code, Sparse):
            count = store.code.slots
            rows, row = (count, tokens) if at[0] == "keys" else (count * (tokens // SLOT_TOKENS), dim)
            codes[at] = SideLayout(dim, (), width, spans, None, slots=Slots(count, rows, row, offset))
            offset = aligned(offset + 2 * rows * row)
        elif isinstance(store.code, Chosen):
            beside = Beside(dim, store.code.bits, store.code.below, offset)
            codes[at] = SideLayout(dim, (), width, spans, None, beside=beside)
            offset = aligned(offset + beside.size(tokens))
        elif isinstance(store.code, Additive):
            row = store.code.of(dim).row
            streams, offset = _streams(8, row, _natural(8, row)[1], tokens, offset)
            codes[at] = SideLayout(dim, streams, width, spans, None, row=row)
        else:
            bits = code_bits(store.code) or 0
            if in_trits(store.code):
                streams, offset = _digit_stream(spans, width, tokens, offset)
            else:
                streams, offset = _streams(bits, dim // coupled(store.code), width, tokens, offset, _least(store))
            codes[at] = SideLayout(dim, streams, width, spans, None, coupled=coupled(store.code))
    metas = {at: _meta(store, dims[at], shape.kv_heads, tokens) for at, store in stores.items()}
    for at, meta in metas.items():
        if meta is not None and not meta.shared:
            metas[at] = replace(meta, offset=offset)
            offset = aligned(offset + meta.size)
        if (rank := codes[at].factors) is not None:  # the vectors of a block, where others have scales
            codes[at] = replace(codes[at], factors=replace(rank, vectors_offset=offset))
            offset = aligned(offset + 2 * rank.blocks * rank.rank * dims[at])
        if (slots := codes[at].slots) is not None:
            codes[at] = replace(codes[at], slots=replace(slots, places_offset=offset))
            offset = aligned(offset + slots.entries)
        if (part := stores[at].balance) is not None:
            one = stores[at].of_tokens
            entries = tokens if one else tokens // part.tokens * dims[at]
            codes[at] = replace(codes[at], across=Across(part.tokens, one, entries, offset))
            offset = aligned(offset + 2 * entries)
        if (choice := stores[at].chosen) is not None:
            count, blocks = choice.count(shape.head_dim), tokens // choice.tokens
            codes[at] = replace(codes[at], channels=Channels(count, choice.tokens, blocks, offset))
            offset = aligned(offset + count * blocks)
    head_bytes = offset
    offset = head_bytes * shape.kv_heads
    for at, meta in metas.items():
        if meta is not None and meta.shared:
            metas[at] = replace(meta, offset=offset)
            offset = aligned(offset + meta.size)
    sides: dict[str, SideLayout] = {}
    for side, depth in reversed(stores):
        here = side, depth
        sides[side] = replace(codes[here], meta=metas[here], rest=sides.get(side))
    keys, values = sides["keys"], sides.get("values") or replace(sides["keys"], rest=None)
    return Layout(shape.head_dim, shape.kv_heads, tokens, head_bytes, offset, keys, values, scheme.shared)
