"""Quantizing into pages, in Triton: the pack kernels of either side.

One pack program owns one token block (or 32 single tokens) of one kv head: statistics, metadata, codes, words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvdsl.codes import TRITS
from kvdsl.window import token_block

from .codec import call, coding, fine, in_steps, made, settled, statistics, stored_numbers, words
from .codec_text import functions
from .layout import Stream
from .placement import within_groups
from .plan import Plan, SidePlan
from .text import Lines, bare, fill, padded, plus
from .tiling import PAIR
from .triton_additive import coded as sums_coded
from .triton_attend import parameters, pools
from .triton_blocks import Block, Given, InPlanes, OverHeads, Walked, measured, settle
from .triton_meta import entry, section, static_read
from .triton_planes import Planes
from .triton_vectors import coded, first_channel

KEEP = """
@triton.jit
def keep_$side(
    step,
    bh,
    begin,
    end,
    first,
    $args
):
    # the tokens of block `step` that are in [begin, end): measured, coded, stored
    b = bh // $heads
    h = bh % $heads
    u = step * $span + tl.arange(0, $lanes_t)
    lowest_u = tl.maximum(step * $span, begin)
    inside = (u >= begin) & (u < end)$span_mask
    if (step * $span < end) & (step * $span + $span > begin):
        page = tl.load(table_ptr + b.to(tl.int64) * table_width + step * $span // $page).to(tl.int64)
        t = u % $page
        place = (lowest_u - first) % ring + u - lowest_u
        row = (offset + tl.where(place < ring, place, place - ring)).to(tl.int64)
        $lanes
        source = $rows_ptr + (bh.to(tl.int64) * total_rows + row)[:, None] * $head_dim + $lane[None, :]$first_lane
        $body
"""

PACK = """
@triton.jit(do_not_specialize=["total_rows", "table_width", "offset", "ring", "first_step"])
def pack_$side(
    first_ptr,
    begin_ptr,
    end_ptr,
    $args
    first_step,
):
    bh = tl.program_id(1)
    b = bh // $heads
    begin = tl.load(begin_ptr + b)
    end = tl.load(end_ptr + b)
    first = tl.load(first_ptr + b)
    keep_$side(
        tl.program_id(0) + first_step,
        bh,
        begin,
        end,
        first,
        $args
    )
"""


class Pack(Planes):
    """Prints `pack_keys` or `pack_values`, and the functions they call; tiles lie [tokens, lanes] for both sides."""

    def __init__(self, plan: Plan, side: SidePlan) -> None:
        super().__init__(plan, side)
        self.transposed = False
        self.single = token_block(side.store) == 1
        self.span = side.span
        self.tokens = padded(self.span)
        # tokens that share a scale come as whole blocks: where a tile is as large as one, all of them are there
        self.inside_t = "inside" if self.single or self.tokens != self.span else ""
        meta = side.layout.meta
        self.apart = meta is not None and meta.tokens > 1 and meta.channels == 1  # each channel has its own scale

    def lane_lines(self) -> list[str]:
        """Two channels a thread where each is measured: with wide loads many threads would measure the same eight."""
        lines = super().lane_lines()
        if not self.apart:
            return lines
        return [f"{self.lane} = tl.max_contiguous(tl.arange(0, {self.lanes}), 2)", *lines[1:]]

    def body(self) -> list[str]:
        """Lines from the rows of a program's tokens to what is stored of them."""
        plan, side, body = self.plan, self.side, Lines()
        if side.floats:
            self._floats(body)
        else:
            if any(not stream.paired for stream in side.layout.planar):
                body.add(
                    f"words = pool16_ptr + page * {plan.layout.page_bytes // 2} + h * {plan.layout.head_bytes // 2}"
                )
            if side.layout.meta is not None:
                self._online(body)
            elif side.alphabet.vectors:
                coded(self, body)
            else:
                names = ["scale", *(["offset"] if side.has_offset else [])] if side.static else []
                for j in range(side.layout.planes):
                    self.load_planes(body, [j])
                    body.extend(static_read(self, j, self.lane) if side.static else [])
                    self._encode(body, j, [f"{self.prefix}_{name}[None, :]" for name in names])
            self._words(body)
        return body.lines

    def text(self) -> str:
        plan, side = self.plan, self.side
        body = self.body()
        pool_args = sorted({*pools(plan), "pool8_ptr", "pool16_ptr"})
        params = [p for p in parameters(plan) if p.startswith(f"{side.label}_")]
        text = "\n".join(body)
        beside = ["counts_ptr", "above_ptr"] if side.raised else []  # how many levels, and codes above the lowest bits
        rows = "coded_ptr" if side.turned or made(side) else "rows_ptr"
        args = [rows, *(["squares_ptr"] if side.sketched else []), *beside]
        args += [f"{side.space}_start_ptr"] if side.factors else []
        args += [p for p in pool_args if p in text] + ["table_ptr", *params]
        args += ["total_rows", "offset", "ring", "table_width"]
        self.arguments = tuple(args)
        holes: dict[str, list[str] | str | int] = {
            "side": side.label,
            "heads": plan.shape.kv_heads,
            "args": [f"{name}," for name in args],
        }
        keep = fill(
            KEEP, **holes, rows_ptr=rows, span=self.span, lanes_t=self.tokens, page=plan.layout.page_tokens,
            lanes=self.lane_lines(), lane=first_channel(self),
            span_mask=f" & (tl.arange(0, {self.tokens}) < {self.span})" if self.tokens != self.span else "",
            head_dim=side.stride, first_lane=plus(side.first) if side.band else "", body=body,
        )  # fmt: skip
        return "\n\n".join([*(functions(side, "tl.") if side.coded else []), keep, fill(PACK, **holes)])

    def _floats(self, body: Lines) -> None:
        layout, side = self.plan.layout, self.side
        size = 4 if side.floats == "fp32" else 2
        start = (
            f"page * {layout.page_bytes // size} + h * {layout.head_bytes // size} + {side.layout.float_offset // size}"
        )
        body.add(f"out = pool_{side.floats}_ptr + {start}")
        body.add(f"out = out + t[:, None] * {self.side.dim} + {self.lane}[None, :]")
        for j in range(side.layout.planes):
            mask = self.mask("inside", j)
            body.add(f"x = tl.load({self.at('source', j)}, mask={mask}, other=0.0).to(tl.float32)")
            if side.floats == "fp16":
                body.add("x = tl.where(x == x, finite(x), x).to(tl.float16)")
            body.add(f"tl.store({self.at('out', j)}, x, mask={mask})")

    def load_planes(self, body: Lines, planes: Iterable[int]) -> None:
        """x<plane> of some planes: of float32 ones just before they are needed, as a token block of all channels would
        fill the registers."""
        body.extend([f"x{j} = {self.loaded('source', j)}" for j in planes])

    def loaded(self, rows: str, plane: int) -> str:
        """A plane's numbers of the tokens of the tile, as they stand in their rows; 0 where there are none."""
        mask = self.mask(self.inside_t, plane)
        return f"tl.load({self.at(rows, plane)}{f', mask={mask}, other=0.0' if mask else ''})"

    # ---- blocks ---------------------------------------------------------------------------------------------------

    def _online(self, body: Lines) -> None:
        """Of every block of the tile: statistics, stored numbers, codes."""
        side, meta, planes = self.side, self.side.layout.meta, range(self.side.layout.planes)
        assert meta is not None
        size, base = section(side, self.plan.layout.page_bytes, self.plan.layout.head_bytes)
        body.add(f"meta = pool{8 * size}_ptr + {base}")
        if side.raised:
            self._raised(body)
        if side.sketched:
            self._block(body, "0", Given(self), planes)
        elif meta.heads > 1:
            body.add("# blocks span heads: each program reads them all")
            vector = "t" if self.single else "tl.arange(0, 1)"
            self._block(body, "0", OverHeads(self), planes, f"({vector} * 0 + h) % {meta.heads} == 0")
        elif meta.channels == 1 or within_groups(side.layout, meta.channels):
            self._in_registers(body)
        else:
            body.add("# groups are narrower than a plane, or cross planes: each lane walks its own group")
            for j in planes:
                lane = f"({self.lane} + {self.start(j)})"
                self._block(body, lane, Walked(self, j), [j], f"{lane} % {meta.channels} == 0")

    def _in_registers(self, body: Lines) -> None:
        """Blocks that are planes, one or several."""
        side, planes, meta = self.side, range(self.side.layout.planes), self.side.layout.meta
        assert meta is not None
        groups = {self.plane_lane(j): [j] for j in planes}
        if meta.channels > 1:
            of = [span.channels[0] // meta.channels for span in side.layout.spans]
            groups = {str(index): [j for j in planes if of[j] == index] for index in range(meta.groups)}
        blocks = {group: InPlanes(self, members) for group, members in groups.items()}
        if not settled(side) or fine(side):
            for group, block in blocks.items():
                self.load_planes(body, block.members)
                body.extend(settle(side, {"": block}, halves=False) if settled(side) else [])
                self._block(body, group, block, block.members)
            return
        # float16 numbers are few registers: all are asked for at once, and one branch looks after all that are odd
        self.load_planes(body, planes)
        several = len(blocks) > 1
        marks = {f"_{i}" if several else "": block for i, block in enumerate(blocks.values())}
        halves = several or statistics(side) != ["top"]
        body.extend(settle(side, marks, halves=halves))
        for mark, (group, block) in zip(marks, blocks.items(), strict=True):
            body.extend([f"spoilt = spoilt{mark}"] if several else [])
            if halves:
                body.add(*(f"{name} = {name}{mark}.to(tl.float32)" for name in statistics(side)))
                body.add(*(f"x{j} = x{j}.to(tl.float32)" for j in block.members))
            self._block(body, group, block, block.members)

    def _block(self, body: Lines, group: str, block: Block, members: Sequence[int], only: str = "") -> None:
        """Measure, store the numbers of channel group `group` where `only` holds, encode the member planes."""
        if self.side.raised:
            mask = f", mask={inside}, other=2.0" if (inside := self.inside(members[0])) else ""
            body.add(f"count = tl.load({self.at('counts', members[0])}{mask})")
        body.extend(measured(self.side, block))
        self.load_planes(body, [] if block.in_registers else members)
        body.add(f"{', '.join(words(self.side))} = {call(self.side, 'words', [*stored_numbers(self.side), 'spoilt'])}")
        self._store(body, group, only, members[0])
        if self.side.alphabet.sums:
            over = in_steps(self.side, "finite(x{j}.to(tl.float32))", "tl.").replace("scale", f"scale{block.column}")
            sums_coded(self, members, [f"x{j} = {over.format(j=j)}" for j in members], body)
            return
        for j in members:
            self._encode(body, j, [f"{name}{block.column}" for name in coding(self.side)])

    def _store(self, body: Lines, group: str, only: str, plane: int) -> None:
        """Store the words of channel group `group`, or of those of a plane's lanes, where `only` holds."""
        side, meta = self.side, self.side.layout.meta
        assert meta is not None
        block = f"step * {self.span} % {self.plan.layout.page_tokens} // {meta.tokens}" if meta.blocks > 1 else "0"
        wide = f"{group} // {meta.channels}" if meta.channels > 1 and not group.isdigit() else group
        if group.isdigit():  # one number a token, or one in all
            index, mask = (entry(side, "t", group), "inside") if self.single else (entry(side, block, group), "")
            if not self.single:
                index, mask = f"{index} + tl.arange(0, 1)", "tl.arange(0, 1) == 0"
        elif self.single:  # a number for each token and lane
            index = entry(side, "t[:, None]", f"({wide})[None, :]")
            mask, only = self.mask("inside", plane), f"({only})[None, :]" if only else ""
        else:
            mask = self.inside(plane) if self.partial(plane) else f"{self.lane} < {self.width}"
            index = entry(side, block, wide)
        mask = f"({mask}) & ({only})" if only else mask
        body.add(f"tl.store(meta + {index}, word, mask={mask})")
        if meta.kind == "words":
            body.add(f"tl.store(meta + {index} + {meta.total}, second, mask={mask})")

    def _encode(self, body: Lines, plane: int, under: list[str]) -> None:
        """Codes of a plane under its numbers, put into their words at once: they are not kept."""
        body.add(f"c = {call(self.side, 'encode', [f'x{plane}', *under])}")
        self.put(body, plane)

    def put(self, body: Lines, plane: int) -> None:
        """Codes c of a plane into their words."""
        joint = "+" if self.side.uniform is not None else "|"  # what is added to whole numbers becomes one constant
        for stream in self.side.layout.streams:
            place = self.side.layout.place(stream, plane)
            if stream.digits:
                self._add_digit(body, stream, plane)
                continue
            bits = f"(c >> {stream.shift})" if stream.shift else "c"
            whole = self.side.alphabet.bits == stream.width + stream.shift and not self.side.raised
            if not whole or len(self.side.layout.streams) > 1:
                bits = f"({bits} & {2**stream.width - 1})"
            shift = 8 * place.byte + place.bit
            word = self._word(stream, place.tile)
            begun = any(other.tile == place.tile for other in stream.places[: place.plane])
            moved = f"({bits} << {shift})" if shift else bits
            body.add(f"{word} = {word} {joint} {moved}" if begun else f"{word} = {bare(moved)}")
        if self.side.raised:
            higher = f"(c >> {self.side.alphabet.bits}).to(tl.uint8)"
            body.add(f"tl.store({self.at('above', plane)}, {higher}, mask={self.mask('inside', plane)})")

    def _raised(self, body: Lines) -> None:
        """How many levels every channel has, and where the bits above those of all channels go, a byte each."""
        dim = self.side.dim
        blocks = f"(bh.to(tl.int64) * (total_rows // {self.span}) + (step * {self.span} - first) // {self.span})"
        body.add(f"counts = counts_ptr + {blocks} * {dim} + {self.lane}")
        body.add(f"above = above_ptr + (bh.to(tl.int64) * total_rows + row)[:, None] * {dim} + {self.lane}[None, :]")

    def _add_digit(self, body: Lines, stream: Stream, plane: int) -> None:
        """Sum the digits of a byte, each times its power of 3; lanes without a channel have none."""
        word, power = self._word(stream, 0), 3 ** (TRITS - 1 - stream.places[plane].bit)
        if self.partial(plane):
            body.add(f"c = tl.where({self.inside(plane)}[None, :], c, 0)")
        body.add(f"{word} = {f'{word} + ' if plane else ''}{f'c * {power}' if power > 1 else 'c'}")

    def _word(self, stream: Stream, tile: int) -> str:
        return f"word{stream.width}_{tile}"

    def _words(self, body: Lines) -> None:
        """Store the words: whole where a token has its own, else single bytes."""
        plan, lane = self.plan, self.lane
        for stream in self.side.layout.planar:
            if stream.paired:
                base = f"page * {plan.layout.page_bytes} + h * {plan.layout.head_bytes} + {stream.offset}"
                row = f"(t // {2 * PAIR} * {PAIR} + t % {PAIR}) * {2 * stream.row_words} + t % {2 * PAIR} // {PAIR}"
                body.add(f"byte = {row}")
                body.add(f"out = pool8_ptr + {base} + byte[:, None] + 2 * {lane}[None, :]")
            else:
                body.add(f"out = words + t[:, None] * {stream.row_words} + {lane}[None, :]{plus(stream.offset // 2)}")
            for tile in range(stream.tiles):
                step = tile * self.width * (2 if stream.paired else 1)
                kind = "tl.uint8" if stream.paired else "tl.int16"
                at = f"out + {step}" if step else "out"
                word = self._word(stream, tile)
                word = f"digits_byte({word})" if stream.digits else word
                mask = f", mask={inside}" if (inside := self.mask(self.inside_t)) else ""
                body.add(f"tl.store({at}, {word}.to({kind}){mask})")
