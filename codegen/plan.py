"""The plan: a scheme lowered for a shape, ready to be printed.  Everything both printers decide from, proven."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from kvdsl.rules import refuse_for
from kvdsl.scheme import SIDES, Band, Rotate, Scheme, Side, Store
from kvdsl.shape import Shape
from kvdsl.window import TILE, token_block, windows

from .alphabet import alphabet_of
from .bijection import BijectionProof, prove_bijection
from .layout import Layout, SideLayout, lay_out
from .placement import When, place
from .side import SidePlan
from .tiling import AHEAD, NARROWEST, PAIR, sub_tile, tile

__all__ = ["Plan", "SidePlan", "plan_for"]

DECODE_ROWS = 8
EXTEND_ROWS = 16
WIDEST = 256  # numbers of a value that 16 rows of sums are kept of
EDGE_TILE = 16
WORD = 32  # signs of channels in a word
EXACT_TILE = 16  # tokens a tile where products are of float32 numbers, outside the tensor cores


@dataclass(frozen=True)
class Plan:
    """`tile` tokens are read at a time, as `halves` sub-tiles: several where tokens share words, or few of them a
    scale.  `masked`: not all tokens of a tile are there; `abreast`: sub-tiles are multiplied two at a time, see
    `triton_abreast`."""

    scheme: Scheme
    shape: Shape
    layout: Layout
    keys: SidePlan
    values: SidePlan
    tile: int
    halves: int
    bijection: tuple[BijectionProof, ...]
    masked: bool = False
    abreast: bool = False

    @cached_property
    def at_edges(self) -> Plan:
        """The plan of the tiles at a sequence's edges, some of whose tokens may not be packed."""
        return replace(self, tile=self.edge_tile, halves=1, masked=True, abreast=False)

    @cached_property
    def of_decode(self) -> Plan:
        """The plan of decode, of one query: two tokens stand abreast where their rows leave half of the columns free
        and `extend`, of as many columns, is there for more queries."""
        few = 2 * self.shape.group <= DECODE_ROWS and not self._may_have_more and not self.shape.placed
        few = few and max(self.keys.row, self.values.row) <= WIDEST
        shared = self.keys.rescaled and self.halves == 1  # a query that was scaled for all of a tile would be so twice
        if shared or not (few and _columnar(self.keys) and _columnar(self.values)):
            return self
        return replace(self, halves=max(2, self.halves), abreast=True)

    @cached_property
    def in_pairs(self) -> bool:
        """Rotary positions of keys turn pairs of planes, see `triton_pairs`."""
        side, layout = self.keys, self.keys.layout
        if side.rope is None or self.masked or self.shape.placed or self.exact_keys:
            return False
        plain = not (side.rope.interleaved or side.polar or side.floats or layout.digits) and side.joined == 1
        plain = plain and not (side.factored or side.shifted)
        plain = plain and not (side.alphabet.vectors or side.alphabet.sums)
        width = layout.plane_width
        operands = width >= NARROWEST and width & (width - 1) == 0
        if side.ordered and self.shape.head_dim > WIDEST // 2:
            return False  # two warps have no registers for waves of so many channels
        return plain and operands and layout.planes % 2 == 0 and layout.planes * width == self.shape.head_dim

    @cached_property
    def rotates(self) -> bool:
        """Programs that read pages rotate the query themselves."""
        side, width = self.keys, self.keys.layout.plane_width
        alone = _rotates_planes(side) and side.rope is None and not (side.rounded or side.masked)
        return alone and self.shape.dtype != "fp32" and (width <= WORD and side.row % WORD == 0 or not drawn(side))

    @cached_property
    def adds_planes(self) -> bool:
        """Programs that read pages add up the planes of a rotated output, of which a merge rotates those of a plane."""
        return _rotates_planes(self.values)

    @property
    def maps_query(self) -> bool:
        """Packed tokens meet what a kernel of its own makes of the query."""
        return self.keys.through and not self.rotates

    @property
    def turns(self) -> range:
        """The first of the sub-tiles that are multiplied at once."""
        return range(0, self.halves, 1 + self.abreast)

    @property
    def exact_keys(self) -> bool:
        """Whether products with decoded keys are of float32 numbers."""
        return self.shape.dtype == "fp32" or self.keys.floats == "fp32"

    @property
    def exact_numbers(self) -> bool:
        """Whether products with decoded keys, or with decoded values, are of float32 numbers."""
        return self.exact_keys or self.values.floats == "fp32"

    def side(self, name: str) -> SidePlan:
        """A side, or a term of one, by its label."""
        return self._by_label[name]

    @cached_property
    def _by_label(self) -> dict[str, SidePlan]:
        """Terms by their own names; bands by that of their row, which is the first one's."""
        return {name: term for term in reversed(self.terms) for name in (term.label, term.space)}

    @property
    def terms(self) -> tuple[SidePlan, ...]:
        """All that a page holds: the keys' terms, then the values'."""
        return self.keys.terms + self.values.terms

    @property
    def stored(self) -> tuple[SidePlan, ...]:
        """Those that have sections of their own there."""
        return self.keys.terms if self.values.shared else self.terms

    @property
    def spaces(self) -> tuple[SidePlan, ...]:
        """The terms of both sides whose numbers are those of a map of their own."""
        return self.keys.spaces + self.values.spaces

    @cached_property
    def queries(self) -> SidePlan | None:
        """What queries are rounded to behind the keys' map, as a side that is nowhere stored; None: as they are."""
        if self.scheme.queries is None:
            return None
        return replace(plan_for(Scheme(both=self.scheme.queries), self.shape).keys, home="queries", fine=True)

    @property
    def half(self) -> int:
        """Tokens of a sub-tile."""
        return self.tile // self.halves

    @property
    def page_tiles(self) -> int:
        """Tiles of a page."""
        return self.layout.page_tokens // self.tile

    @cached_property
    def at_once(self) -> bool:
        """A token's key and value are packed at once, and come back from a cut at once, so that never one is decoded
        and the other exact."""
        keys, values = windows(self.scheme).values()
        return keys == values

    @property
    def edge_tile(self) -> int:
        """Tokens that the masked part of attention decodes or reads at a time."""
        return EDGE_TILE

    def rows(self, *, many: bool) -> int:
        """Query rows of a program: 8, or 16 where there are more of them and two warps can share the planes; 4 of
        decode where two tokens stand abreast.

        Planes of 16 channels are one tensor-core operand, and a second warp would only repeat the work of the first.
        Sums over wide vectors, queries for several heads, maps on both sides, which exact rows do not share, and keys
        rotated in the loop with levels of the parameters or a map beside them fill the registers at 8 rows.
        """
        if not many and self.of_decode.abreast:
            return DECODE_ROWS // 2
        return EXTEND_ROWS if self._may_have_more and (many or self.shape.group > DECODE_ROWS) else DECODE_ROWS

    def columns(self, *, many: bool) -> int:
        """Columns of a program's products: its query rows, those of both tokens where two stand abreast."""
        return self.rows(many=many) * (2 if not many and self.of_decode.abreast else 1)

    @cached_property
    def _may_have_more(self) -> bool:
        shared = all(term.layout.plane_width >= 2 * NARROWEST for term in self.terms)
        apart = all(side.apart or side.residual is not None for side in (self.keys, self.values))
        full = self.values.row > WIDEST or apart
        turned = self.keys.alphabet.fitted or self.keys.mixed or self.keys.ordered
        full = full or self.keys.rope is not None and turned
        full = full or self.keys.joined > 1 and self.keys.row > WIDEST
        return shared and not full

    @property
    def sinks(self) -> int:
        return self.scheme.sinks.tokens if self.scheme.sinks else 0


@cache
def plan_for(scheme: Scheme, shape: Shape) -> Plan:
    """Lower a scheme.  Raises SchemeError if it does not fit the shape, ProofError if the page is no bijection."""
    refuse_for(scheme, shape)
    layout = lay_out(scheme, shape)
    proofs = prove_bijection(layout)
    dims = {name: scheme.dim(name, shape.head_dim) for name in SIDES}
    keys, values = (_planned(name, scheme.side(name), layout.side(name), shape, dims[name]) for name in SIDES)
    values = replace(values, shared=scheme.shared)
    if scheme.queries is not None:
        keys = _rounded(keys)
    terms = keys.terms + values.terms
    paired = any(term.layout.paired for term in terms)
    # two planes at once are decoded, with what they become, or looked up
    narrow = any(term.polar or term.alphabet.looked_up and term.alphabet.small is None for term in terms)
    blocked = [term for term in terms if term.when is When.ONCE_PER_TILE or term.factors]
    # a factor a token beside scores of more of them fills the registers of what scores tokens twice
    blocks = [min(TILE, term.layout.across.tokens) for term in terms if term.layout.across]
    blocks += [token_block(term.store) for term in blocked] + [term.chosen.tokens for term in terms if term.chosen]
    in_loop = shape.dtype == "fp32" or any(term.when is When.IN_LOOP or term.joined > 1 for term in terms)
    ragged = any(term.layout.plane_width < NARROWEST for term in terms)
    crowded = all(side.groups > 1 and len(side.layout.streams) > 1 for side in (keys, values))
    heavy = in_loop or ragged or crowded
    least = TILE if paired or any(_few_bytes(term) for term in terms) else PAIR
    tokens = tile(scheme, layout.head_bytes / layout.page_tokens, least=least, heavy=heavy)
    half = sub_tile(tokens, blocks, narrow=paired or narrow)
    if not paired and any(term.floats == "fp32" for term in terms):
        tokens = half = EXACT_TILE
    plan = Plan(scheme, shape, layout, keys, values, tokens, tokens // half, proofs)
    # the waves of every channel of an order stay in registers
    return replace(plan, halves=max(plan.halves, tokens // PAIR)) if keys.ordered and plan.in_pairs else plan


def _rounded(side: SidePlan) -> SidePlan:
    """A side, of all of whose terms packed tokens meet a rounded query."""
    return replace(side, rounded=True, rest=None if side.rest is None else _rounded(side.rest))


def drawn(side: SidePlan) -> bool:
    """Whether a Hadamard rotation has random signs."""
    return any(isinstance(part, Rotate) and part.kind == "random_hadamard" for part in side.store.linear)


def _rotates_planes(side: SidePlan) -> bool:
    """Packed tokens meet the query, or add to the output, through a Hadamard rotation alone, each of whose blocks is of
    whole planes, or each plane of whole blocks."""
    width, planes = side.layout.plane_width, side.layout.planes
    if not (side.hadamard and side.through and len(side.terms) == 1) or side.polar:
        return False
    plain = not (side.layout.digits or side.alphabet.vectors or side.floats) and width >= NARROWEST
    powers = width & (width - 1) == 0 and planes & (planes - 1) == 0 and planes * width == side.row
    return plain and powers and (width % side.hadamard == 0 or side.hadamard % width == 0)


def _columnar(side: SidePlan) -> bool:
    """Tokens of a side may stand abreast: nothing but numbers of one term is read, whose scales are a token's, a
    query's, or nowhere in the loop.  Levels that are looked up, codes of three streams, and those of two with many
    scales would fill the registers, and digits of two sub-tiles are as many instructions and more text."""
    plain = len(side.terms) == 1 and not (side.floats or side.polar or side.shared or side.layout.across)
    plain = plain and not (side.slots or side.factors or side.beside or side.masked or side.rope)
    plain = plain and not (side.alphabet.looked_up or side.layout.digits)
    streams = len(side.layout.streams)
    plain = plain and (streams < 2 or streams == 2 and not side.rescaled and side.groups <= 4) and side.joined == 1
    meta = side.layout.meta
    apart = side.when in (When.NEVER, When.AFTER_DOT, When.ONCE_PER_QUERY) or side.rescaled
    return plain and apart and not (meta is not None and meta.kind == "words")


def _few_bytes(term: SidePlan) -> bool:
    """What PAIR tokens have stored of their own is too little to be asked for ahead of time."""
    meta = term.layout.meta
    return meta is not None and meta.tokens == 1 and PAIR * meta.groups * meta.element < AHEAD


def _planned(
    name: Side, store: Store, part: SideLayout, shape: Shape, dim: int, depth: int = 0, first: int = 0
) -> SidePlan:
    """A term of a store and those behind it; `dim`: numbers of a vector of the side."""
    term, row, rest = store.terms[depth], store.rows(name)[depth], None
    if part.rest is not None:
        rest = _planned(name, store, part.rest, shape, dim, depth + 1, first + row * part.width * term.joined)
    alphabet = alphabet_of(term, _channels(term, shape))
    home = name if isinstance(term, Band) else store.placed(name)[depth][0]
    fine = shape.dtype != "fp16"
    when = place(term, part)
    return SidePlan(name, term, part, when, alphabet, dim, rest, depth, first, row, fine, home=home)


def _channels(store: Store, shape: Shape) -> int:
    """Channels of a block; of a band those that one of its numbers tells of."""
    if isinstance(store, Band) and store.measure is None:
        return store.channels
    channels = store.measure.block.channels if store.measure is not None else None
    return channels if isinstance(channels, int) else store.measured(shape.head_dim)
