"""The plan: a scheme lowered for a shape, ready to be printed.  Everything both printers decide from, proven."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal

from kvdsl.rules import refuse_for
from kvdsl.scheme import SIDES, Float, PreRope, Scale, Scheme, Side, Sketch, Store, Uniform
from kvdsl.shape import Shape
from kvdsl.window import token_block

from .alphabet import Alphabet, alphabet_of
from .bijection import BijectionProof, prove_bijection
from .layout import (
    NARROWEST,
    PAIR,
    Layout,
    Place,
    SideLayout,
    Stream,
    lay_out,
)
from .placement import When, place

if TYPE_CHECKING:
    from .absorb import Absorbed
    from .algebra import NormalForm

DECODE_ROWS = 8
EXTEND_ROWS = 16
WIDEST = 256  # numbers of a value that 16 rows of sums are kept of
EDGE_TILE = 16
EXACT_TILE = 16  # tokens a tile where products are of float32 numbers, outside the tensor cores


@dataclass(frozen=True)
class SidePlan:
    """One side, or what is stored of what another store left: what it is, where it stands, where its scale is applied.

    A vector is the sum of its terms.  The numbers that they code stand one behind the other in one row, so that one map
    takes a query to what all of them meet, and their sums to an output.
    """

    name: Literal["keys", "values"]
    store: Store
    layout: SideLayout
    when: When
    alphabet: Alphabet
    channels: int
    """Of the head's vector."""
    residual: SidePlan | None = None
    depth: int = 0
    """How many stores left something before this one."""
    first: int = 0
    """Where the numbers of this term begin in the side's row."""

    @property
    def terms(self) -> tuple[SidePlan, ...]:
        """This and what is stored of what is left, as `Store.terms`."""
        return (self, *(self.residual.terms if self.residual else ()))

    @property
    def label(self) -> str:
        """The end of the names of this term's functions."""
        return self.name + "_residual" * self.depth

    @property
    def product(self) -> str:
        """The name of the torch function that multiplies what is packed: with a query, or under weights."""
        return ("score" if self.name == "keys" else "weigh") + "_residual" * self.depth

    @property
    def path(self) -> str:
        """The beginning of the names of this term's parameters."""
        return self.name + ".residual" * self.depth

    @property
    def title(self) -> str:
        """What a person calls this term."""
        return self.name + ", what is left" * self.depth

    @property
    def number(self) -> str:
        """What a decoded number is called in formulas: k or v, r of what is left."""
        return "r" if self.depth else self.name[0]

    @property
    def letter(self) -> str:
        """The beginning of the names of what is read of this term."""
        return self.name[0] + "r" * self.depth

    @property
    def row(self) -> int:
        """Numbers of a vector that are coded, of all terms."""
        return sum(term.dim for term in self.terms)

    @property
    def span(self) -> int:
        """Tokens that one program of `pack` quantizes: a token block, or 32 single tokens."""
        block = token_block(self.store)
        return block if block > 1 else PAIR

    @property
    def held(self) -> int:
        """Numbers a program of `pack` keeps at a time: planes whose channels have scales of their own come singly."""
        alone = self.store.measure is not None and self.store.measure.block.channels == 1
        return self.span * (self.layout.plane_width if alone else self.dim)

    @cached_property
    def form(self) -> NormalForm:
        """The derivation and its proof: made when text is printed, not when stored text is loaded."""
        from .algebra import derive

        return derive(self.name, self.store, self.when, self.alphabet)

    @cached_property
    def absorbed(self) -> Absorbed | None:
        """What becomes of the map of the space that is coded, with its proof; None where there is no map."""
        from .absorb import absorb

        return absorb(self.name, self.store, self.number)

    @property
    def through(self) -> bool:
        """Packed tokens meet the query, or add to the output, through one map of all terms."""
        return self.hoisted or self.residual is not None

    @property
    def scale(self) -> Scale:
        assert self.store.measure is not None
        return self.store.measure

    @property
    def uniform(self) -> Uniform | None:
        """The code, where its levels are evenly spaced by definition."""
        return self.store.code if isinstance(self.store.code, Uniform) else None

    @property
    def dim(self) -> int:
        """Numbers of a coded vector."""
        return self.layout.width

    @property
    def sketched(self) -> bool:
        """Codes are signs: a scale is measured on the vector itself, before it is mapped."""
        return isinstance(self.store.code, Sketch)

    @property
    def turned(self) -> bool:
        """What is coded is not the vector itself."""
        return self.store.turned

    @property
    def mapped(self) -> bool:
        """What is coded is a map of the vector, undone on the query or on the output, or in the loop."""
        return self.store.mapped

    @property
    def hoisted(self) -> bool:
        """That map leaves the loop over tokens."""
        return self.store.hoisted

    @property
    def hadamard(self) -> int:
        """The size of the Hadamard matrix that the map is made of, which sums and differences apply; 0 where the map
        is another one."""
        return self.store.hadamard(self.channels)

    @property
    def butterflies(self) -> int:
        """The same of whole planes, in the loop; 0 also where planes are no power of two."""
        size, width = self.hadamard, self.layout.plane_width
        return size if width & (width - 1) == 0 and not self.layout.digits else 0

    @property
    def apart(self) -> bool:
        """Packed tokens meet another query, or add to another output, than exact ones."""
        return self.store.apart

    @property
    def polar(self) -> bool:
        """Radii and angles are decoded, and become channels in the loop."""
        return self.store.polar

    @property
    def rope(self) -> PreRope | None:
        """Rotary positions were taken off, and are put back on decoded numbers in the loop."""
        return self.store.rope

    @property
    def shifted(self) -> bool:
        """Reading adds a vector to what is decoded and mapped back."""
        return self.store.shifted

    @property
    def floats(self) -> str | None:
        """The float format, where the numbers themselves are stored."""
        code = self.store.code
        return code.format if isinstance(code, Float) and code.plain else None

    @cached_property
    def operands(self) -> tuple[Stream, ...]:
        """What a product reads: the streams of an affine alphabet one by one, else whole codes, plane by plane."""
        if not (self.alphabet.looked_up or self.layout.digits):
            return self.layout.streams
        places = tuple(Place(plane, plane, 0, 0) for plane in range(self.layout.planes))
        return (Stream(self.alphabet.bits, 0, False, 0, 0, 0, places),)

    @property
    def second(self) -> Scale | None:
        """The second level: a calibrated scale that the stored numbers are multiplied by."""
        return self.store.measure.scale if self.store.measure is not None else None

    @property
    def static(self) -> bool:
        """Scales come from calibration, not from the page."""
        return self.store.measure is not None and self.store.measure.when == "calibrated"

    @property
    def offset_stored(self) -> bool:
        """A second number stands beside each scale."""
        scale = self.store.measure
        return scale is not None and scale.range in ("minmax", "minmax_zero") and scale.zero != "in_scale"

    @property
    def has_offset(self) -> bool:
        """The decoded number needs a second number, stored or hidden in the scale."""
        scale = self.store.measure
        return scale is not None and scale.range in ("minmax", "minmax_zero")

    @property
    def groups(self) -> int:
        """Channel groups with a scale of their own, applied behind the dot product (else 1)."""
        if self.when is When.AFTER_DOT and self.layout.meta is not None:
            return self.layout.meta.groups
        return 1

    @property
    def rescaled(self) -> bool:
        """Each tile multiplies queries already rounded to float16 by its scale: half the instructions, equal error."""
        whole = self.when is When.ONCE_PER_TILE and self.scale.dtype == "fp16" and self.second is None
        return self.name == "keys" and whole and self.alphabet.step == 1

    def run(self, stream: Stream, plane: int) -> range:
        """Positions, in the plane's byte, of the planes that share its scale: only those may be read uncleaned.

        Rescaled queries leave no place to take off what uncleaned planes have too much.
        """
        place = stream.places[plane]
        if self.rescaled:
            return range(place.bit // stream.width, place.bit // stream.width + 1)
        positions = [
            other.bit // stream.width
            for other in stream.places
            if (other.tile, other.byte) == (place.tile, place.byte) and self.group(other.plane) == self.group(plane)
        ]
        return range(min(positions), max(positions) + 1)

    def group(self, plane: int) -> int:
        """The channel group that plane belongs to, of those counted by `groups`."""
        return self.layout.spans[plane].channels[0] * self.groups // self.dim


@dataclass(frozen=True)
class Plan:
    """`tile` tokens are read at a time, as `halves` sub-tiles: two where tokens share words, or 32 of them a scale."""

    scheme: Scheme
    shape: Shape
    layout: Layout
    keys: SidePlan
    values: SidePlan
    tile: int
    halves: int
    bijection: tuple[BijectionProof, ...]

    @property
    def exact_keys(self) -> bool:
        """Whether products with decoded keys are of float32 numbers."""
        return self.shape.dtype == "fp32" or self.keys.floats == "fp32"

    def side(self, name: str) -> SidePlan:
        """A side, or a term of one, by its label."""
        return next(term for term in self.terms if term.label == name)

    @property
    def terms(self) -> tuple[SidePlan, ...]:
        """All that a page holds: the keys' terms, then the values'."""
        return self.keys.terms + self.values.terms

    @property
    def half(self) -> int:
        """Tokens of a sub-tile."""
        return self.tile // self.halves

    @property
    def edge_tile(self) -> int:
        """Tokens that the masked part of attention decodes or reads at a time."""
        return EDGE_TILE

    def rows(self, *, many: bool) -> int:
        """Query rows of a program: 8, or 16 where there are more of them and two warps can share the planes.

        Planes of 16 channels are one tensor-core operand, and a second warp would only repeat the work of the first.
        Sums over wide vectors, maps on both sides, which exact rows do not share, and keys rotated in the loop with
        levels of the parameters or a map beside them fill the registers at 8 rows.
        """
        shared = all(term.layout.plane_width >= 2 * NARROWEST for term in self.terms)
        apart = self.keys.apart and self.values.apart
        full = self.values.row > WIDEST or apart
        full = full or self.keys.rope is not None and (self.keys.alphabet.given or self.keys.mapped)
        more = many or self.shape.group > DECODE_ROWS
        return EXTEND_ROWS if shared and more and not full else DECODE_ROWS

    @property
    def sinks(self) -> int:
        return self.scheme.sinks.tokens if self.scheme.sinks else 0


@cache
def plan_for(scheme: Scheme, shape: Shape) -> Plan:
    """Lower a scheme.  Raises SchemeError if it does not fit the shape, ProofError if the page is no bijection."""
    refuse_for(scheme, shape)
    layout = lay_out(scheme, shape)
    proofs = prove_bijection(layout)
    keys, values = (_planned(name, scheme.side(name), layout.side(name), shape) for name in SIDES)
    terms = keys.terms + values.terms
    paired = any(term.layout.paired for term in terms)
    narrow = any(term.when is When.ONCE_PER_TILE and token_block(term.store) % (2 * PAIR) for term in terms)
    # two planes at once are decoded, with what they become, or looked up
    narrow = narrow or any(term.polar or term.alphabet.looked_up and term.alphabet.small is None for term in terms)
    tile, halves = 2 * PAIR, 2 if paired or narrow else 1
    if not paired and any(term.floats == "fp32" for term in terms):
        tile, halves = EXACT_TILE, 1
    return Plan(scheme, shape, layout, keys, values, tile, halves, proofs)


def _planned(name: Side, store: Store, part: SideLayout, shape: Shape, depth: int = 0, first: int = 0) -> SidePlan:
    """A store and what is stored of what it leaves."""
    rest = None
    if isinstance(store.residual, Store) and part.residual is not None:
        rest = _planned(name, store.residual, part.residual, shape, depth + 1, first + part.width)
    alphabet = alphabet_of(store, _channels(store, shape))
    return SidePlan(name, store, part, place(store, part), alphabet, shape.head_dim, rest, depth, first)


def _channels(store: Store, shape: Shape) -> int:
    """Channels of a block."""
    channels = store.measure.block.channels if store.measure is not None else None
    return channels if isinstance(channels, int) else shape.head_dim
