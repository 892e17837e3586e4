"""A side's words in Triton: loading them, taking planes and codes out of them, decoding them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sympy as sp

from .codec import given
from .layout import Stream
from .plan import Plan, SidePlan
from .printer import number
from .steps import Steps
from .text import padded, plus
from .tiling import PAIR
from .triton_additive import summed, tables
from .triton_groups import of_groups, side_by_side
from .triton_meta import entry, pointer, read, static_read, times_across
from .triton_names import RIGHT, head_name, mark, own, pair_name, tokens_name
from .triton_tables import Part, joined, known, look_up, registers, small_floats
from .triton_vectors import first_channel, looked_up, table_lines


class Planes:
    """Loading a side's words and taking planes out of them.  Keys lie [tokens, lanes], values [lanes, tokens]."""

    def __init__(self, plan: Plan, side: SidePlan, head: int | None = None) -> None:
        """`head`: which of the heads that are rotated together is read; None: the program's own."""
        self.plan, self.side, self.head = plan, side, head
        self.width = side.layout.plane_width
        self.lanes = max(16, padded(self.width))
        self.prefix = side.letter
        self.lane = f"{self.prefix}_lane"
        self.transposed = side.name == "values"
        looked_up = side.alphabet.looked_up
        # a masked word read as float16 is the code times 2**-24
        unit = sp.Integer(2) ** (side.alphabet.unit if looked_up else 24)
        self.steps = Steps(side, unit, "", ".to(tl.float16)", side.alphabet.lift, plan.abreast)

    @property
    def scale(self) -> str:
        """What a stored scale is called."""
        return f"{self.prefix}_scale"

    @property
    def offset(self) -> str:
        """What a stored offset is called."""
        return f"{self.prefix}_offset"

    @property
    def meta(self) -> str:
        """The address of the page's stored numbers."""
        return f"{pointer(self.side)} + {self.prefix}_meta"

    @property
    def guard(self) -> str:
        """The mask of the tokens whose words and metadata may be read; nothing where all may: of a key what is read in
        vain makes a score that is masked, of a value it would meet a weight of 0."""
        return "coded" if self.plan.masked and self.transposed else ""

    @property
    def mark(self) -> str:
        """What tells names apart from those of the first term and head."""
        return mark(self.side, self.head)

    def own(self, lines: list[str]) -> list[str]:
        """Lines with names of their own, beside those of other terms and heads."""
        return own(lines, self.side, self.head)

    @property
    def ragged(self) -> bool:
        """A plane is narrower than its tile: lanes beyond it are masked."""
        return self.lanes != self.width

    def lane_lines(self) -> list[str]:
        """Lines that stand before all others: the lanes, and what comes with the parameters for all tokens."""
        return self.head_lines() if self.head else self._lane_lines() + self.given_lines() + self.head_lines()

    def head_lines(self) -> list[str]:
        """Lines that name the head, where it is one of several, and what comes with the parameters for it."""
        if self.head is None:
            return []
        first = f"h // {self.side.joined} * {self.side.joined}{plus(self.head)}"
        return [f"{head_name(self.side, self.head)} = {first}", *self.own(self._outer())]

    def _lane_lines(self) -> list[str]:
        lines = [f"{self.lane} = tl.arange(0, {self.lanes})"]
        if self.ragged:
            lines.append(f"{self.lane}_in = {self.lane} < {self.width}")
        for j, span in enumerate(self.side.layout.spans):
            if self.partial(j):
                low = f"({self.lane} >= {span.low}) & " if span.low else ""
                high = f"{self.lane} < {span.high}"
                lines.append(f"{self.lane}_in{j} = {low}{f'({high})' if low else high}")
        return lines

    def partial(self, plane: int) -> bool:
        """A plane's channels are not all lanes of its words."""
        span = self.side.layout.spans[plane]
        return span.high - span.low < self.width

    def inside(self, plane: int) -> str:
        """The name of the mask of a plane's lanes; nothing where all lanes are channels."""
        if self.partial(plane):
            return f"{self.lane}_in{plane}"
        return f"{self.lane}_in" if self.ragged else ""

    def start(self, plane: int) -> int:
        """The channel of a plane's lane 0."""
        return self.side.layout.spans[plane].start

    def given_lines(self) -> list[str]:
        """Lines that load what comes with the parameters for all tokens: a table's levels, the second level."""
        side, lines = self.side, []
        for index, name in enumerate(given(side, "loss")):  # all levels there are
            if name == "outer":
                lines += self._outer()
            else:
                lines.append(f"{self.prefix}_{name} = tl.load({side.label}_table_ptr{plus(index)}).to(tl.float32)")
        lines += table_lines(self) if side.alphabet.vectors else tables(side)
        return lines + (registers(self) if side.alphabet.given else [])

    def _outer(self) -> list[str]:
        """The line that loads the second level, where there is one."""
        if self.side.second is None:
            return []
        head = " + h" if self.side.second.block.heads == 1 else ""
        return [f"{self.prefix}_outer = tl.load({self.side.label}_second_ptr{head}).to(tl.float32)"]

    def grid(self, tokens: str, lanes: str) -> tuple[str, str]:
        """Index expressions of tokens and lanes for a tile of this side."""
        if self.transposed:
            return f"{tokens}[None, :]", f"{lanes}[:, None]"
        return f"{tokens}[:, None]", f"{lanes}[None, :]"

    def mask(self, tokens: str, plane: int | None = None) -> str:
        """The mask of a tile load, of words or of a plane's channels: lanes in range and, if `tokens` names a token
        mask, tokens too."""
        inside = f"{self.lane}_in" * self.ragged if plane is None else self.inside(plane)
        token, lane = self.grid(tokens, inside)
        return " & ".join(([token] if tokens else []) + ([lane] if inside else []))

    def words(self, stream: Stream, tile: int, half: int) -> str:
        which = half // 2 if stream.paired else half
        several = self.plan.halves > (2 if stream.paired else 1)
        return f"{self.prefix}{stream.width}_{tile}{f'_{which}' if several else ''}"

    def at_once(self, half: int) -> list[tuple[int, str]]:
        """The sub-tiles that are multiplied at once, `half` being the first, and how names of what each meets end."""
        return [(half, ""), (half + 1, RIGHT)] if self.plan.abreast else [(half, "")]

    def load_at_once(self, half: int, tokens: str) -> list[str]:
        """Load the words of these sub-tiles; `tokens` of the page are those of all of them."""
        if not self.plan.abreast:
            return self.load(half, tokens)
        return [line for i, _ in self.at_once(half) for line in self.load(i, tokens_name(self.plan, i))]

    def load(self, half: int, tokens: str) -> list[str]:
        """Load the words of sub-tile `half`, whose tokens of the page are `tokens`; paired words come with the first
        of the two that share them.

        A page is whole, so words of tokens that were never packed are read too: any code, never used."""
        if self.plan.masked:
            return self.load_tokens(tokens)
        lines = []
        mask = self.mask("")
        other = f", mask={mask}, other=0" if mask else ""
        for stream in self.side.layout.planar:
            if stream.paired and half % 2:
                continue
            token, lane = self.grid(pair_name(self.plan, half) if stream.paired else tokens, self.lane)
            for tile in range(stream.tiles):
                start = stream.offset // 2 + tile * self.width
                address = f"{token} * {stream.row_words} + {lane}{plus(start)}"
                lines.append(f"{self.words(stream, tile, half)} = tl.load(words + {address}{other})")
        for stream in self.side.layout.planar:
            for tile in range(stream.tiles):
                if not stream.paired or half % 2:
                    name = self.words(stream, tile, half)
                    lines.append(f"{name}_high = upper({name})")
            if stream.digits:
                name = self.words(stream, 0, half)
                lines += self._digits(f"{name}_high" if half % 2 else f"lower({name})")
        return lines

    def _digits(self, bytes_: str) -> list[str]:
        """Take the digits out of bytes that stand in the low halves of words.

        Of a byte as a number behind the point of base 3: times 3, the digit is the upper byte, the rest the lower one.
        Three instructions a pair of digits; prefixes b*3^j >> 8 and their differences take as many and more registers,
        digits taken one by one from the byte a tenth more in the whole loop (`kvdsl compile kvtq`).
        """
        lines = []
        for place in range(1 + max(place.bit for stream in self.side.layout.streams for place in stream.places)):
            lines += [f"{self.prefix}_three = thrice({bytes_})", f"{self._digit(place)} = upper({self.prefix}_three)"]
            bytes_ = f"lower({self.prefix}_three)"
        return lines

    def _digit(self, place: int) -> str:
        return f"{self.prefix}_digit{place}"

    def operand(self, stream: Stream, plane: int, half: int) -> str:
        """What a product reads of a plane, float16: of an affine alphabet the dirty plane, the place's bits of the byte
        and those below that share its scale; else the level of each code."""
        if self.side.alphabet.looked_up:
            return self._looked_up(self._parts(plane, half))
        if self.side.layout.digits:
            ((name, _),) = self._parts(plane, half)
            return f"{name}.to(tl.float16, bitcast=True)"
        place = self.side.layout.place(stream, plane)
        high = bool(half % 2) if stream.paired else bool(place.byte)
        name = self.words(stream, place.tile, half) + ("_high" if high else "")
        bits = self.word_bits(stream, plane)
        return f"{name}.to(tl.float16, bitcast=True)" if bits == 255 and high else f"plane({name}, {bits})"

    def word_bits(self, stream: Stream, plane: int) -> int:
        """The bits of a byte that a product reads of a plane of an affine alphabet: what it reads where all are set."""
        top = self.side.layout.place(stream, plane).bit + stream.width
        return int(2**top - 2 ** (self.side.run(stream, plane).start * stream.width))

    def _looked_up(self, parts: list[Part]) -> str:
        """The levels of one plane's codes as float16, over 2**unit."""
        if self.side.alphabet.small is not None:
            return small_floats(self.side, *parts)
        text = look_up(self.side, parts, known(self, "half", self.side.alphabet.words))
        return f"{text}.to(tl.float16, bitcast=True)"

    def _parts(self, plane: int, half: int) -> list[Part]:
        """(words, first bit) of a plane in each stream; of digits (the digits, 0)."""
        found = []
        for stream in self.side.layout.planar:
            place = self.side.layout.place(stream, plane)
            if stream.digits:
                found.append((self._digit(place.bit), 0))
            else:
                byte = half % 2 if stream.paired else place.byte
                found.append((self.words(stream, place.tile, half), 8 * byte + place.bit))
        return found

    def _numbered(self, parts: list[Part]) -> str:
        """The codes of one plane, or their levels to the last bit where they are looked up, as float32."""
        alphabet = self.side.alphabet
        if alphabet.small is not None or alphabet.levels and alphabet.looked_up and alphabet.halves:
            unit = f" * {number(sp.Integer(2) ** alphabet.unit)}" if alphabet.unit else ""
            return f"{self._looked_up(parts)}.to(tl.float32){unit}"
        if alphabet.looked_up:
            high, low = (
                known(self, name, entries) for name, entries in zip(("high", "low"), alphabet.singles, strict=True)
            )
            # outside the main loop, two tables a number: one plane at a time, if registers are to last
            found = [look_up(self.side, parts, half, alone=True) for half in (high, low)]
            return f"joined({', '.join(found)})"
        # widened first: from 16 bits the compiler was seen to lose what follows the conversion, for some lanes
        return f"{joined(self.side, parts)}.to(tl.int32).to(tl.float32)"

    def block(self, half: int) -> str:
        """The token block, within its page, of sub-tile `half` (one block spans the sub-tile)."""
        meta = self.side.layout.meta
        assert meta is not None
        if meta.blocks == 1:
            return "0"
        return f"(page_token + {half * self.plan.half}) // {meta.tokens}" if half else f"page_token // {meta.tokens}"

    def at(self, source: str, plane: int) -> str:
        """The address of a plane's first lanes, from that of plane 0."""
        return f"{source}{plus(self.start(plane))}"

    def plane_lane(self, plane: int) -> str:
        """The channels of a plane."""
        first = first_channel(self)
        return f"({first} + {self.start(plane)})" if self.start(plane) else first

    def channel_group(self, plane: int) -> str:
        """The channel group of each lane of a plane."""
        meta = self.side.layout.meta
        assert meta is not None
        lane = self.plane_lane(plane)
        return lane if meta.channels == 1 else f"{lane} // {meta.channels}"

    def one_group(self, plane: int) -> int | None:
        """The channel group of all lanes of a plane; None where they are of several."""
        meta = self.side.layout.meta
        assert meta is not None
        channels = self.side.layout.spans[plane].channels
        first, last = (channel // meta.channels for channel in (channels[0], channels[-1]))
        return first if first == last else None

    def decode(self, half: int, tokens: str) -> list[str]:
        """Decode every plane of loaded words into float32 tiles n0, n1, ...: what cannot leave the loop, and unpack."""
        return [line for j in range(self.side.layout.planes) for line in self.decode_plane(j, half, tokens)]

    def decode_plane(self, plane: int, half: int, tokens: str) -> list[str]:
        """n<plane>: one plane of loaded words, decoded, float32."""
        meta = self.side.layout.meta
        block = self.block(half) if meta is not None and meta.tokens % self.plan.half == 0 else ""
        return [*self._letters(plane, tokens, self._parts(plane, half)), *self._number(plane, tokens, "", block)]

    def channels(self, decode: Callable[[int], list[str]]) -> Iterator[tuple[int, list[str]]]:
        """Every plane, and lines behind which n<plane> are its channels: radii and angles, that are decoded by planes,
        become two planes of channels at once."""
        planes = self.side.layout.planes
        if not self.side.polar:
            yield from ((j, decode(j)) for j in range(planes))
            return
        for j in range(planes // 2):
            other = j + planes // 2
            yield j, [*decode(j), *decode(other), f"n{j}, n{other} = cartesian(n{j}, n{other})"]
            yield other, []

    def packed_channels(self, half: int, tokens: str) -> Iterator[tuple[int, list[str]]]:
        """`channels` of the loaded words of sub-tile `half`."""
        floats = self.side.floats
        return self.channels(lambda j: self.decode_token(j, tokens) if floats else self.decode_plane(j, half, tokens))

    def edge_channels(self, guard: str = "") -> Iterator[tuple[int, list[str]]]:
        """`channels` of the tokens t of `load_tokens`; `guard` as in `decode_token`."""
        return self.channels(lambda j: self.decode_token(j, "t", guard))

    def load_tokens(self, tokens: str) -> list[str]:
        """Load the words of any tokens of the page; where two tokens share words, each takes its own byte."""
        side, lines = self.side, []
        for stream in side.layout.planar:
            row = tokens
            if stream.paired:
                row = "pair_row"
                lines.append(f"pair_row = {tokens} // {2 * PAIR} * {PAIR} + {tokens} % {PAIR}")
            token, lane = self.grid(row, self.lane)
            mask = self.mask(self.guard)
            other = f", mask={mask}, other=0" if mask else ""
            shift, _ = self.grid(f"({tokens} % {2 * PAIR} // {PAIR} * 8)", self.lane)
            for tile in range(stream.tiles):
                name = f"{self.prefix}{stream.width}_{tile}"
                address = f"{token} * {stream.row_words} + {lane}{plus(stream.offset // 2 + tile * self.width)}"
                lines.append(f"{name} = tl.load(words + {address}{other})")
                if stream.digits:
                    lines += self._digits(f"(({name} >> {shift}) & 255).to(tl.int16)")
                elif stream.paired:
                    # the shift has made them 32 bits wide
                    narrow = ".to(tl.int16)" if side.alphabet.looked_up or self.plan.masked else ""
                    kept = f"({name} >> {shift}) & 255"
                    lines.append(f"{name} = ({kept}){narrow}" if narrow else f"{name} = {kept}")
                else:
                    lines.append(f"{name}_high = upper({name})")
        return lines

    def decode_token(self, plane: int, tokens: str, guard: str = "") -> list[str]:
        """n<plane>: one plane of the tokens of `load_tokens`, decoded, float32.

        `guard` names the mask of tokens whose metadata may be read; others decode to a finite number.
        """
        side = self.side
        if side.floats:
            token, lane = self.grid(tokens, self.lane)
            mask = self.mask(guard, plane)
            other = f", mask={mask}, other=0.0" if mask else ""
            address = f"{side.rows} + {token} * {side.dim} + {lane}"
            return [f"place = {self.at(address, plane)}", f"n{plane} = tl.load(place{other}).to(tl.float32)"]
        places = [(stream.width, side.layout.place(stream, plane)) for stream in side.layout.planar]
        parts = [(f"{self.prefix}{width}_{place.tile}", 8 * place.byte + place.bit) for width, place in places]
        if side.layout.digits:
            parts = self._parts(plane, 0)
        return [*self._letters(plane, tokens, parts), *self._number(plane, tokens, guard, self._edge_block())]

    def letters(self, plane: int, half: int, tokens: str) -> list[str]:
        """c = what the codes of one plane of the loaded words of a sub-tile stand for without a scale."""
        return self._letters(plane, tokens, self._parts(plane, half))

    def _letters(self, plane: int, tokens: str, parts: list[Part]) -> list[str]:
        """c = what the codes of one plane stand for without a scale, or themselves."""
        if self.side.alphabet.sums:
            return summed(self, plane, tokens)
        return looked_up(self, plane, parts) if self.side.alphabet.vectors else [f"c = {self._numbered(parts)}"]

    def _edge_block(self) -> str:
        """The token block of an edge tile, where none has tokens of several."""
        meta, size, page = self.side.layout.meta, self.plan.edge_tile, self.plan.layout.page_tokens
        several = f"tile % {page // size} // {meta.tokens // size}" if meta and meta.blocks > 1 else "0"
        return "" if meta is None or meta.tokens % size else several

    def _number(self, plane: int, tokens: str, guard: str, block: str = "") -> list[str]:
        """n<plane> from the codes c of one plane; `block`: the token block that all tokens are of, read once."""
        side, lines, names, meta = self.side, list[str](), (self.scale, self.offset), self.side.layout.meta
        if meta is not None:
            token, lane = self.grid(tokens, self.plane_lane(plane))
            token = block or (f"{token} // {meta.tokens}" if meta.tokens > 1 else token)
            group, mask = self.one_group(plane), self.mask("" if block else guard, plane)
            alone = group is None and side_by_side(self)
            if alone:
                lines += of_groups(self, plane, tokens, guard)
            elif group is None:
                lane = f"{lane} // {meta.channels}" if meta.channels > 1 else lane
            else:  # a column of tokens, or one number
                lane, mask = str(group), self.grid(guard, "")[0] if guard and not block else ""
            if not alone and (group is None or plane == 0 or side.polar or group != self.one_group(plane - 1)):
                lines += read(side, self.meta, entry(side, token, lane), *names, mask=mask)
        elif side.static:
            lines += static_read(self, plane, self.grid(tokens, self.lane)[1])
        decoded = f"n{plane} = {self.steps.number('c', *names)}"
        return [*lines, decoded, *times_across(self, plane, tokens, guard)]
