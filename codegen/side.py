"""A term of a side, planned: what it is, where it stands, where its scale is applied, what its names are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from kvdsl.scheme import Band, Float, Parted, PreRope, Scale, Sketch, Sparse, Store, Uniform
from kvdsl.window import token_block

from .alphabet import Alphabet
from .layout import Place, SideLayout, Stream
from .placement import When
from .sections import Beside, Channels, Factors, Slots
from .tiling import PAIR

if TYPE_CHECKING:
    from .absorb import Absorbed
    from .algebra import NormalForm


@dataclass(frozen=True)
class SidePlan:
    """One side, what another store left, or a band: what it is, where it stands, where its scale is applied.

    A vector is the sum of its terms.  The numbers that they code stand one behind the other in one row, so that one map
    takes a query to what all of them meet, and their sums to an output.  Bands are stretches of one such row, which
    becomes the vector as a whole.
    """

    name: Literal["keys", "values"]
    store: Store
    layout: SideLayout
    when: When
    alphabet: Alphabet
    channels: int
    """Of the head's vector."""
    rest: SidePlan | None = None
    """The term behind this one."""
    depth: int = 0
    """How many terms stand before this one."""
    first: int = 0
    """Where the numbers of this term begin in the side's row, see `Store.rows`."""
    in_row: bool = True
    """Whether it has a place there."""
    fine: bool = False
    """Whether vectors have numbers that may be smaller than float16 has any."""
    shared: bool = False
    """Whether it is read where the keys' first stretch stands, and nowhere written."""
    rounded: bool = False
    """Whether packed tokens meet a rounded query."""
    home: str = ""
    """Where its store stands in the spec: the beginning of the names of the map of its row."""

    @cached_property
    def terms(self) -> tuple[SidePlan, ...]:
        """This and those behind it, as `Store.terms`."""
        return (self, *(self.rest.terms if self.rest else ()))

    @property
    def band(self) -> Band | None:
        """Which stretch of a row it is, where it is one."""
        return self.store if isinstance(self.store, Band) else None

    @property
    def stretch(self) -> bool:
        """It is a band of the vector's own channels."""
        return self.band is not None and not self.polar

    @property
    def residual(self) -> SidePlan | None:
        """What is stored of what this term leaves."""
        return None if self.band else self.rest

    @cached_property
    def spaces(self) -> tuple[SidePlan, ...]:
        """The terms whose numbers are those of a map of their own; of bands, which share one, the first."""
        return (self,) if self.band else self.terms

    @cached_property
    def parts(self) -> tuple[SidePlan, ...]:
        """The terms that the numbers of this one's space are stored as: its bands, or itself."""
        return self.terms if self.band else (self,)

    @cached_property
    def label(self) -> str:
        """The end of the names of this term's functions."""
        return f"{self.name}_band{self.depth}" if self.band else self.space

    @cached_property
    def space(self) -> str:
        """The end of the names of the functions of the map of this term's row."""
        return self.home.replace(".store", "").replace(".", "_")

    @cached_property
    def product(self) -> str:
        """The name of the torch function that multiplies what is packed: with a query, or under weights."""
        return ("score" if self.name == "keys" else "weigh") + self.space.removeprefix(self.name)

    @property
    def path(self) -> str:
        """The beginning of the names of this term's parameters."""
        return f"{self.name}.code.stores[{self.depth}]" if self.band else self.home

    @property
    def outliers(self) -> bool:
        """Whether this term is of outliers: channels, or single numbers."""
        return bool(self.slots or self.chosen or self.store.pick and self.store.pick.top)

    @property
    def title(self) -> str:
        """What a person calls this term."""
        if self.band:
            own = f"{'numbers' if self.mapped else 'channels'} from {self.first} on"
            return f"{self.name}, {own if self.stretch else f'angles of level {self.depth}' if self.depth else 'radii'}"
        if self.outliers:
            return f"{self.name}, {'single numbers' if self.slots else 'outlier channels'}"
        return self.name + ", what is left" * self.home.count(".residual")

    @property
    def number(self) -> str:
        """What a decoded number is called: k or v, o of outlier channels, r of a rest; r a radius, a2 an angle."""
        if self.band and not self.stretch:
            return f"a{self.depth}" if self.depth else "r"
        return self.name[0] if self.stretch else self.mark[-1:] or self.name[0]

    @property
    def letter(self) -> str:
        """The beginning of the names of what is read of this term."""
        return self.name[0] + self.mark

    @property
    def mark(self) -> str:
        """What tells the names of this term from those of the others of its side."""
        if self.band and (self.depth or not self.stretch):
            return "abcdef"[self.depth]
        return "o" * self.outliers + "r" * self.home.count(".residual")

    @property
    def row(self) -> int:
        """Numbers of a row, of all terms that have a place of their own and of all heads that are rotated together."""
        return sum(term.dim * term.joined for term in self.terms if term.in_row)

    @property
    def joined(self) -> int:
        """How many neighbouring kv heads are mapped as one vector: what is coded of them is read for each."""
        return self.store.joined

    @property
    def heads(self) -> tuple[int | None, ...]:
        """Which of those heads a kernel reads beside one another; None: its own alone, or those of keys that are mapped
        back as one vector in the loop."""
        return tuple(range(self.joined)) if self.joined > 1 and self.hoisted else (None,)

    @property
    def stride(self) -> int:
        """Numbers of the rows that this term's are read from and written to: those of all bands, or its own."""
        return int(self.dim / self.band.share) if self.band else self.dim

    @property
    def span(self) -> int:
        """Tokens that one program of `pack` quantizes: a token block, or 32 single tokens."""
        block = token_block(self.store)
        return block if block > 1 else PAIR

    @cached_property
    def form(self) -> NormalForm:
        """The derivation and its proof: made when text is printed, not when stored text is loaded."""
        from .algebra import derive

        return derive(self.name, self.store, self.when, self.alphabet)

    @cached_property
    def absorbed(self) -> Absorbed | None:
        """What becomes of the map of the space that is coded, with its proof; None where there is no map."""
        from .absorb import absorb

        return absorb(self.name, self.store, self.name[0] if self.band else self.number)

    @property
    def through(self) -> bool:
        """Packed tokens meet the query, or add to the output, through one map of all terms, or behind its rounding."""
        return self.hoisted or self.rounded or not self.band and any(term.in_row for term in self.terms[1:])

    @property
    def scale(self) -> Scale:
        assert self.store.measure is not None
        return self.store.measure

    @property
    def rows(self) -> str:
        """What the rows of a page's numbers are called, where they are stored as they are."""
        return f"{self.letter}_floats" if self.band or self.shared or self.mark else f"{self.name[:-1]}_floats"

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
        """Codes are signs, under a scale of the vector itself, before it is mapped."""
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
    def mixed(self) -> bool:
        """It stays in the loop, behind rotary positions, as a matrix: its numbers are sums over channels."""
        return self.store.mixed

    @property
    def ordered(self) -> bool:
        """Behind rotary positions each number is one channel's, in an order of the head's own."""
        return self.rope is not None and self.store.channelwise and self.store.permuted

    @property
    def factored(self) -> bool:
        """Behind rotary positions numbers have factors, which go onto the query."""
        return self.mixed or self.rope is not None and self.store.scaled

    @property
    def hadamard(self) -> int:
        """The size of the Hadamard matrix that the map of a head's vector is made of, which sums and differences apply;
        0 where the map is another one, or one of several heads."""
        return self.store.hadamard(self.channels) if self.joined == 1 else 0

    @property
    def butterflies(self) -> int:
        """The same of whole planes, in the loop; 0 also where planes are no power of two.  Of several heads each one's
        share."""
        size, width = min(self.store.hadamard(self.channels), self.channels), self.layout.plane_width
        return size if width & (width - 1) == 0 and not self.layout.digits else 0

    @property
    def apart(self) -> bool:
        """Exact tokens meet another query, or add to another output, than any term of the packed ones."""
        return self.plain is None

    @cached_property
    def plain(self) -> SidePlan | None:
        """The term whose numbers are the vector's own, as exact ones are: those meet its query, or add to its sums.  Of
        several the one of the widest planes.  None where reading adds a vector to packed tokens alone, or they meet a
        rounded query, and where a residual stands alone behind codes: exact rows of their own take fewer registers."""
        alone = self.residual is not None and not any(term.store.gathers for term in self.terms)
        if self.shifted or self.rounded or alone:
            return None
        terms = (self,) if self.band else self.terms
        own = (term for term in terms if not term.mapped and term.rope is None)
        gathered = self.name == "keys"  # slots load no query
        fit = [term for term in own if not (gathered and term.store.gathers)]
        return max(fit, key=lambda term: term.layout.plane_width, default=None)

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
    def factors(self) -> Factors | None:
        """Where vectors of low rank stand, if they are what is stored."""
        return self.layout.factors

    @property
    def slots(self) -> Slots | None:
        """Where single numbers stand, if they are what is stored."""
        return self.layout.slots

    @property
    def beside(self) -> Beside | None:
        """Where numbers of channels that are chosen anew stand, if they are what is stored."""
        return self.layout.beside

    @property
    def chosen(self) -> Channels | None:
        """Which channels this term is of, where they are chosen anew."""
        return self.layout.channels

    @property
    def parted(self) -> Parted | None:
        """This term's store, where it stands beside one of channels that are chosen anew."""
        return self.store if isinstance(self.store, Parted) else None

    @property
    def masked(self) -> bool:
        """Vectors have zeros where the other store of these two looks."""
        return self.parted is not None and self.parted.masked

    @property
    def raised(self) -> Store | None:
        """What codes chosen channels with more bits, of which the lowest stand among this term's own."""
        return self.parted.raised if self.parted is not None else None

    @property
    def choice(self) -> Channels:
        """Where it is told which channels are chosen, of this term or one behind it."""
        return next(term.chosen for term in self.terms if term.chosen is not None)

    @property
    def sparse(self) -> Sparse | None:
        """Which single numbers are taken out of the vectors that this term, the first of its side, is of."""
        first = self.residual
        return first.store.code if first is not None and isinstance(first.store.code, Sparse) else None

    @property
    def coded(self) -> bool:
        """Whether there are codes in planes, not numbers, vectors of low rank, or bits of chosen channels alone."""
        return not (self.floats or self.factors or self.slots or self.beside)

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
        return scale is not None and scale.range in ("minmax", "minmax_zero") and not scale.zero_inside

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
        Rescaled queries leave no place to take off what uncleaned planes have too much."""
        place = stream.places[plane]
        if self.rescaled:
            return range(place.bit // stream.width, place.bit // stream.width + 1)
        byte = [other for other in stream.places if (other.tile, other.byte) == (place.tile, place.byte)]
        found = [other.bit // stream.width for other in byte if self.group(other.plane) == self.group(plane)]
        return range(min(found), max(found) + 1)

    def group(self, plane: int) -> int:
        """The channel group that plane belongs to, of those counted by `groups`."""
        return self.layout.spans[plane].channels[0] * self.groups // self.dim
